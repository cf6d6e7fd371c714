// The key of a slot in host memory, as a grant carries it (docs/wire-format.md, section 2).
#pragma once

#include <cstdint>
#include <vector>

#include "status.h"

namespace hetkv::transport {

struct MemoryKey {
  bool shared = false;            // a descriptor of the memory came before the grant
  std::vector<std::uint8_t> rma;  // UCX's remote key; empty: none
};

std::vector<std::uint8_t> encode(const MemoryKey& key);
// kMalformed where the bytes are no such key, kUnsupported where they are of a later version.
Status decode(const std::vector<std::uint8_t>& bytes, MemoryKey* key);

}  // namespace hetkv::transport
