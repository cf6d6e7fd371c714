// The key of a window in device memory: what a sender of the same vendor needs to store into it, and UCX's own key for
// all others. It travels in a grant's rkey field (docs/wire-format.md, section 2), in place of a bare UCX key.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "status.h"

namespace hetkv::engine {

struct DeviceWindowKey {
  std::array<std::uint8_t, 16> process{};  // a number of the process that owns the window: see `this_process`
  std::string backend;                     // "cuda", "hip"
  std::uint32_t device = 0;                // its ordinal in that process
  HetkvIpcHandle handle{};                 // length 0: none
  std::vector<std::uint8_t> ucx;           // empty where UCX does not reach the memory
};

// Random, and the same for all of this process.
const std::array<std::uint8_t, 16>& this_process();

// Whether the bytes are such a key and not one of UCX's.
bool is_device_key(const std::vector<std::uint8_t>& bytes);
std::vector<std::uint8_t> encode_key(const DeviceWindowKey& key);
// kMalformed where the bytes are no such key, kUnsupported where they are a later version of it.
Status decode_key(const std::vector<std::uint8_t>& bytes, DeviceWindowKey* key);

}  // namespace hetkv::engine
