// The paths whose channels are contiguous on both sides: vectors go through registers, kDepth of them per thread.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"

namespace hetkv::gpu {

// What one item is: tokens `token`, `token + step`, ... of a vector of channels.
struct RowItem {
  std::uint32_t head;
  std::uint32_t channel;
  std::uint32_t token;
  std::uint32_t step;
};

// Items in order: tile of tokens, head, part of the row, token, vector; the last changes from lane to lane.
HETKV_INLINE RowItem row_item(const Job& job, std::uint32_t item, std::uint32_t elements) {
  RowItem at;
  const std::uint32_t lane = job.lane_vectors.split(item);
  at.step = 1u << job.log_lane_tokens;
  at.token = item & (at.step - 1);
  item >>= job.log_lane_tokens;
  at.channel = (job.row_parts.split(item) * job.lane_vectors.divisor + lane) * elements;
  at.head = job.heads.split(item);
  at.token += item * (kDepth << job.log_lane_tokens);
  return at;
}

template <int kWords>
HETKV_INLINE void move_rows(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const RowItem at = row_item(job, item, static_cast<std::uint32_t>(kWords * 4 / item_size(job.src.dtype)));
  const std::uint64_t src = head_channel(job.src, at.head, at.channel);
  const std::uint64_t dst = head_channel(job.dst, at.head, at.channel);
  Vector<kWords> v[kDepth];
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    const std::uint32_t token = at.token + k * at.step;
    if (token < job.tokens) v[k] = load<kWords>(src + token_offset(job.src, token));
  }
  const std::uint64_t key = word_key(job, seed, at.head, at.channel);
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    const std::uint32_t token = at.token + k * at.step;
    if (token >= job.tokens) break;
    store<kWords>(dst + token_offset(job.dst, token), v[k]);
    if (job.wire != WireSide::kNone) partial.checksum += sum(v[k], key + token * job.token_key);
  }
}

// Returns which of the kDepth vectors hold something special: a bit each; those are not written.
template <int kFrom, int kTo>
HETKV_INLINE std::uint32_t convert_rows(const Job& job, const RowItem& at, std::uint64_t src, std::uint64_t dst,
                                        std::uint64_t key, float multiplier, Partial& partial) {
  Vector<2 * kFrom> from[kDepth];
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    const std::uint32_t token = at.token + k * at.step;
    if (token < job.tokens) from[k] = load<2 * kFrom>(src + token_offset(job.src, token));
  }
  std::uint32_t special = 0;
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    const std::uint32_t token = at.token + k * at.step;
    if (token >= job.tokens) break;
    Vector<2 * kTo> to;
    if (!convert8<kFrom, kTo>(job.src.dtype, job.dst.dtype, from[k], multiplier, &to)) {
      special |= 1u << k;
      continue;
    }
    store<2 * kTo>(dst + token_offset(job.dst, token), to);
    const std::uint64_t token_key = key + token * job.token_key;
    if (job.wire == WireSide::kDestination) partial.checksum += sum(to, token_key);
    if (job.wire == WireSide::kSource) partial.checksum += sum(from[k], token_key);
  }
  return special;
}

// The vectors that convert_rows left.
HETKV_INLINE void convert_specials(const Job& job, const RowItem& at, std::uint32_t special, std::uint64_t src,
                                   std::uint64_t dst, std::uint64_t key, float multiplier, Partial& partial) {
  const int from_size = item_size(job.src.dtype);
  const int to_size = item_size(job.dst.dtype);
  const int wire_size = job.wire == WireSide::kSource ? from_size : to_size;
  HETKV_ROLLED
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    if ((special >> k & 1) == 0) continue;
    const std::uint32_t token = at.token + k * at.step;
    const std::uint64_t in = src + token_offset(job.src, token);
    const std::uint64_t out = dst + token_offset(job.dst, token);
    std::uint64_t token_key = key + token * job.token_key;
    std::uint64_t word = 0;
    HETKV_ROLLED
    for (int i = 0; i < static_cast<int>(kGroup); ++i) {
      const std::uint32_t code = load_element(in + static_cast<std::uint64_t>(i * from_size), from_size);
      const std::uint64_t converted = convert_one(job.src.dtype, job.dst.dtype, code, multiplier);
      const std::uint32_t result = static_cast<std::uint32_t>(converted);
      partial.saturated += static_cast<std::uint32_t>(converted >> 32);
      store_element(out + static_cast<std::uint64_t>(i * to_size), to_size, result);
      const int bits = 8 * wire_size * i % 64;
      word |= static_cast<std::uint64_t>(job.wire == WireSide::kSource ? code : result) << bits;
      if (bits + 8 * wire_size < 64) continue;
      if (job.wire != WireSide::kNone) partial.checksum += mix(word, token_key);
      token_key += kChecksumStep;
      word = 0;
    }
  }
}

// With kNarrow neither side is float32.
template <bool kNarrow>
HETKV_INLINE void convert_item(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const RowItem at = row_item(job, item, kGroup);
  const std::uint64_t src = head_channel(job.src, at.head, at.channel);
  const std::uint64_t dst = head_channel(job.dst, at.head, at.channel);
  const std::uint64_t key = word_key(job, seed, at.head, at.channel);
  const float multiplier = job.multipliers != nullptr ? job.multipliers[at.head] : 1.0f;
  std::uint32_t special = 0;
  with_size<kNarrow>(item_size(job.src.dtype), [&](auto from) {
    with_size<kNarrow>(item_size(job.dst.dtype), [&](auto to) {
      special = convert_rows<decltype(from)::value, decltype(to)::value>(job, at, src, dst, key, multiplier, partial);
    });
  });
  if (special != 0) convert_specials(job, at, special, src, dst, key, multiplier, partial);
}

}  // namespace hetkv::gpu
