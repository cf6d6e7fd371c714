// Reading the pool again after an unpack (EngineConfig::verify_bytes): what is there must be what was sent or, where
// the unpack changes bits, what the payload becomes when it is converted a second time. All are ordinary remaps into
// scratch memory, so that they run wherever packs do.
#pragma once

#include <cstdint>

#include "engine/config.h"
#include "engine/mover.h"
#include "wire/message.h"

namespace hetkv::engine {

// Whether packing what was unpacked gives the payload again, bit for bit: nothing is converted, and the pool has no
// scales of its own for it.
bool unpacks_exactly(const LayerPlan& plan);

// Bytes of scratch that a frame takes; a multiple of 8.
std::uint64_t reread_bytes(const LayerPlan& plan, std::uint64_t tokens);

// Adds a frame that moves what the pool holds of it to `scratch`. Its checksum is the record's where the plan unpacks
// exactly, otherwise that of add_expected. `blocks` outlives the task.
void add_reread(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t scratch,
                RemapTask* task);

// Adds a frame that converts the payload once more, to `scratch`, for plans that do not unpack exactly. The payload
// stays where it is until the task is done.
void add_expected(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t payload,
                  std::uint64_t scratch, RemapTask* task);

}  // namespace hetkv::engine
