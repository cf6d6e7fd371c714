// Where elements of a side are on the paths of rows and cells, and the checksum of the words that a thread has in its
// registers. Strides on these paths fit 32 bits (plan.cpp), so that one multiply-add makes an address.
#pragma once

#include "backend/gpu/memory.h"
#include "backend/gpu/plan.h"
#include "remap/checksum.h"

namespace hetkv::gpu {

HETKV_INLINE std::uint64_t times(std::uint32_t n, std::int64_t stride) {
  return static_cast<std::uint64_t>(n) * static_cast<std::uint32_t>(stride);
}

HETKV_INLINE std::uint64_t channel_offset(const Side& side, std::uint32_t channel) {
  return times(channel, side.inner_stride) + times(side.pack.divide(channel), side.pack_step);
}

HETKV_INLINE std::uint64_t head_channel(const Side& side, std::uint32_t head, std::uint32_t channel) {
  return side.base + times(head, side.head_stride) + channel_offset(side, channel);
}

// `token` counts from the job's first.
HETKV_INLINE std::uint64_t token_offset(const Side& side, std::uint32_t token) {
  if (side.blocks == nullptr) return times(token, side.token_stride);
  std::uint32_t block = side.first_token + token;
  const std::uint32_t in_block = side.block_size.split(block);
  const std::uint32_t id = static_cast<std::uint32_t>(side.blocks[block]);
  return times(id, side.block_stride) + times(in_block, side.token_stride);
}

// Key of the wire word at `address`; see checksum_mix. Each token adds `job.token_key`.
HETKV_INLINE std::uint64_t word_key(const Job& job, std::uint64_t seed, std::uint64_t address) {
  return seed + (address / 8 + job.wire_origin) * remap::kChecksumStep;
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
    total += mix(v.w[2 * i] | static_cast<std::uint64_t>(v.w[2 * i + 1]) << 32, key + i * remap::kChecksumStep);
  }
  return total;
}

}  // namespace hetkv::gpu
