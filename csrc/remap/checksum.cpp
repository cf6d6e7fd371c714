#include "remap/checksum.h"

#include <cstring>

namespace hetkv {

std::uint64_t checksum_cpu(const void* data, std::size_t bytes, std::uint64_t offset, std::uint64_t seed) noexcept {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t index = offset / 8;
  std::uint64_t sum = 0;
  for (; bytes >= 8; bytes -= 8, at += 8, ++index) {
    std::uint64_t word;
    std::memcpy(&word, at, 8);
    sum += checksum_mix(word, index, seed);
  }
  if (bytes > 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, at, bytes);
    sum += checksum_mix(word, index, seed);
  }
  return sum;
}

}  // namespace hetkv
