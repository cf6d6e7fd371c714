#include "remap/checksum.h"

#include "remap/isa.h"

namespace hetkv::remap {

std::uint64_t checksum_cpu(const void* data, std::size_t bytes, std::uint64_t offset, std::uint64_t seed) noexcept {
  return kernels().checksum(static_cast<const Bytes*>(data), static_cast<std::int64_t>(bytes), offset / 8, seed);
}

}  // namespace hetkv::remap
