// Where an element of a side lies, and the checksum of the words that a thread has in its registers.
#pragma once

#include "backend/gpu/memory.h"
#include "backend/gpu/plan.h"
#include "remap/checksum.h"

namespace hetkv::gpu {

HETKV_INLINE std::uint64_t head_channel(const Side& side, std::uint32_t head, std::uint32_t channel) {
  return side.base + static_cast<std::uint64_t>(head * side.head_stride + channel * side.inner_stride +
                                                side.pack.divide(channel) * side.pack_step);
}

// `token` counts from the job's first.
HETKV_INLINE std::uint64_t token_offset(const Side& side, std::uint32_t token) {
  if (side.blocks == nullptr) return static_cast<std::uint64_t>(token * side.token_stride);
  std::uint32_t block = side.first_token + token;
  const std::uint32_t in_block = side.block_size.split(block);
  return static_cast<std::uint64_t>(side.blocks[block] * side.block_stride + in_block * side.token_stride);
}

// Key of the wire word that holds (head, token 0, channel); see checksum_mix. Each token adds `job.token_key`.
HETKV_INLINE std::uint64_t word_key(const Job& job, std::uint64_t seed, std::uint32_t head, std::uint32_t channel) {
  const Side& wire = job.wire == WireSide::kSource ? job.src : job.dst;
  const std::uint64_t bytes = static_cast<std::uint64_t>(head * wire.head_stride + channel * wire.inner_stride);
  return seed + (job.wire_word + bytes / 8 + 1) * kChecksumStep;
}

HETKV_INLINE std::uint64_t mix(std::uint64_t word, std::uint64_t key) {
  const std::uint64_t x = word ^ key;
  return (x & 0xFFFFFFFFu) * (x >> 32) + word;
}

// Checksum of a vector of whole words, the first of which has `key`.
template <int kWords>
HETKV_INLINE std::uint64_t sum(const Vector<kWords>& v, std::uint64_t key) {
  std::uint64_t total = 0;
  HETKV_UNROLL
  for (int i = 0; i < kWords / 2; ++i) {
    total += mix(v.w[2 * i] | static_cast<std::uint64_t>(v.w[2 * i + 1]) << 32, key + i * kChecksumStep);
  }
  return total;
}

}  // namespace hetkv::gpu
