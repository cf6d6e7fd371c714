// Payload checksum: a 64-bit sum over the payload's 8-byte little-endian words of mix(word, word index, seed), so that
// it can be computed in any order, and still sees swapped, duplicated and zeroed words. The last word is padded with
// zeros. It guards against faults, not against attackers. docs/wire-format.md is normative.
#pragma once

#include <cstddef>
#include <cstdint>

#include "map.h"

namespace hetkv::remap {

constexpr std::uint64_t kChecksumStep = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio, odd

// x = word ^ (seed + (index + 1) * step); mix = low32(x) * high32(x) + word, all modulo 2^64.
HETKV_HD constexpr std::uint64_t checksum_mix(std::uint64_t word, std::uint64_t index, std::uint64_t seed) {
  const std::uint64_t x = word ^ (seed + (index + 1) * kChecksumStep);
  return (x & 0xFFFFFFFFu) * (x >> 32) + word;
}

// Sum of mix over `bytes` bytes at `data` whose first byte is byte `offset` of the payload (`offset` a multiple of 8).
std::uint64_t checksum_cpu(const void* data, std::size_t bytes, std::uint64_t offset, std::uint64_t seed) noexcept;

}  // namespace hetkv::remap
