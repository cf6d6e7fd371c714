// The path that takes any map: one 8-byte word of the canonical order at a time, element by element.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"

namespace hetkv::gpu {

// Position of element `e` of the job in canonical order.
struct Position {
  std::uint32_t head;
  std::uint32_t token;
  std::uint32_t channel;
};

HETKV_INLINE Position position(const Job& job, std::uint64_t e) {
  Position at;
  if (!job.wide) {
    std::uint32_t rest = static_cast<std::uint32_t>(e);
    at.channel = job.channels.split(rest);
    at.token = job.token_count.split(rest);
    at.head = rest;
    return at;
  }
  at.channel = static_cast<std::uint32_t>(e % job.channels.divisor);
  e /= job.channels.divisor;
  at.token = static_cast<std::uint32_t>(e % job.tokens);
  at.head = static_cast<std::uint32_t>(e / job.tokens);
  return at;
}

// With strides of any size and sign; the functions of address.h take fewer.
HETKV_INLINE std::uint64_t element_address(const Side& side, const Position& at) {
  const std::int64_t channel = at.channel * side.inner_stride + side.pack.divide(at.channel) * side.pack_step;
  const std::uint64_t row = side.base + static_cast<std::uint64_t>(at.head * side.head_stride + channel);
  if (side.blocks == nullptr) return row + static_cast<std::uint64_t>(at.token * side.token_stride);
  std::uint32_t block = side.first_token + at.token;
  const std::uint32_t in_block = side.block_size.split(block);
  return row + static_cast<std::uint64_t>(side.blocks[block] * side.block_stride + in_block * side.token_stride);
}

HETKV_INLINE void next(const Job& job, Position& at) {
  if (++at.channel < job.channels.divisor) return;
  at.channel = 0;
  if (++at.token < job.tokens) return;
  at.token = 0;
  ++at.head;
}

// Moves the elements of word `word`, and fills up the last word of a wire part with zeros.
HETKV_INLINE void move_word(const Job& job, std::uint64_t seed, std::uint64_t word, Partial& partial) {
  const int from_size = item_size(job.src.dtype);
  const int to_size = item_size(job.dst.dtype);
  const int size = job.wire == remap::WireSide::kSource ? from_size : to_size;  // of the side whose words are counted
  const int per_word = 8 / size;
  const std::uint64_t first = word * static_cast<std::uint64_t>(per_word);
  if (first >= job.elements) return;
  Position at = position(job, first);
  std::uint64_t value = 0;
  for (int i = 0; i < per_word && first + static_cast<std::uint64_t>(i) < job.elements; ++i) {
    const std::uint32_t code = load_element(element_address(job.src, at), from_size);
    std::uint32_t result = code;
    if (job.converts) {
      const float multiplier = job.multipliers != nullptr ? job.multipliers[at.head] : 1.0f;
      const std::uint64_t converted = convert_one(job.src.dtype, job.dst.dtype, code, multiplier);
      result = static_cast<std::uint32_t>(converted);
      partial.saturated += static_cast<std::uint32_t>(converted >> 32);
    }
    value |= static_cast<std::uint64_t>(job.wire == remap::WireSide::kSource ? code : result) << (8 * size * i);
    if (!job.whole_words) {
      store_element(element_address(job.dst, at), to_size, result);
    }
    next(job, at);
  }
  if (job.wire == remap::WireSide::kNone) return;
  partial.checksum += mix(value, seed + (job.wire_origin + word) * remap::kChecksumStep);
  if (job.wire == remap::WireSide::kSource) return;
  const std::uint64_t dst = job.dst.base + 8 * word;
  if (job.whole_words) {
    store<2>(dst, {{static_cast<std::uint32_t>(value), static_cast<std::uint32_t>(value >> 32)}});
    return;
  }
  const std::uint64_t left = (job.elements - first) * static_cast<std::uint64_t>(size);
  for (std::uint64_t b = left; b < 8; ++b) store_element(dst + b, 1, 0);
}

}  // namespace hetkv::gpu
