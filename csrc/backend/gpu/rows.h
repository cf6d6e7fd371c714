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
  std::uint32_t left;  // tokens of the job from `token` on; 0: the item is not the job's

  // Whether vector k is the job's; how many tokens after the first it is, or 0 where it is not, so that all vectors
  // may be read without a branch.
  HETKV_INLINE bool has(std::uint32_t k) const { return k * step < left; }
  HETKV_INLINE std::uint32_t after(std::uint32_t k) const { return has(k) ? k * step : 0; }
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
  at.left = at.token < job.tokens ? job.tokens - at.token : 0;
  return at;
}

// Where the kDepth vectors of an item are on one side, where its tokens share a block. The block's id is asked for when
// this is made; `wait` before the first address.
class TiledRows {
 public:
  HETKV_INLINE TiledRows(const Side& side, const RowItem& at) : side_(side), at_(at) {
    in_block_ = at.token;
    if (side.blocks == nullptr) return;
    std::uint32_t block = side.first_token + at.token;
    in_block_ = side.block_size.split(block);
    id_ = static_cast<std::uint32_t>(side.blocks[block]);
  }
  HETKV_INLINE void wait() {
    first_ = head_channel(side_, at_.head, at_.channel) + times(id_, side_.block_stride) +
             times(in_block_, side_.token_stride);
  }
  // Of vector k, or where that is not the job's, of the first.
  HETKV_INLINE std::uint64_t operator[](std::uint32_t k) const {
    return first_ + times(at_.after(k), side_.token_stride);
  }

 private:
  const Side& side_;
  const RowItem& at_;
  std::uint64_t first_;
  std::uint32_t in_block_;
  std::uint32_t id_ = 0;
};

// The same for tokens in any blocks. All ids are asked for before one is waited for.
class ScatteredRows {
 public:
  HETKV_INLINE ScatteredRows(const Side& side, const RowItem& at) : side_(side), at_(at) {
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      in_block_[k] = at.token + at.after(k);
      id_[k] = 0;
      if (side.blocks == nullptr) continue;
      std::uint32_t block = side.first_token + in_block_[k];
      in_block_[k] = side.block_size.split(block);
      id_[k] = static_cast<std::uint32_t>(side.blocks[block]);
    }
  }
  HETKV_INLINE void wait() {
    const std::uint64_t row = head_channel(side_, at_.head, at_.channel);
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      address_[k] = row + times(id_[k], side_.block_stride) + times(in_block_[k], side_.token_stride);
    }
  }
  HETKV_INLINE std::uint64_t operator[](std::uint32_t k) const { return address_[k]; }

 private:
  const Side& side_;
  const RowItem& at_;
  std::uint64_t address_[kDepth];
  std::uint32_t in_block_[kDepth];
  std::uint32_t id_[kDepth];
};

// Key of the first vector's words.
template <typename Rows>
HETKV_INLINE std::uint64_t row_key(const Job& job, std::uint64_t seed, const Rows& src, const Rows& dst) {
  return word_key(job, seed, job.wire == remap::WireSide::kSource ? src[0] : dst[0]);
}

template <int kWords, typename Rows>
HETKV_INLINE void move_rows(const Job& job, std::uint64_t seed, const RowItem& at, Partial& partial) {
  Rows src(job.src, at);
  Rows dst(job.dst, at);
  src.wait();
  Vector<kWords> v[kDepth];
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) v[k] = load<kWords>(src[k]);
  dst.wait();
  const std::uint64_t key = row_key(job, seed, src, dst);
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    if (!at.has(k)) continue;
    store<kWords>(dst[k], v[k]);
    if (job.wire != remap::WireSide::kNone) partial.checksum += sum(v[k], key + k * job.step_key);
  }
}

template <int kWords>
HETKV_INLINE void move_item(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const RowItem at = row_item(job, item, static_cast<std::uint32_t>(kWords * 4 / item_size(job.src.dtype)));
  if (at.left == 0) return;
  if (job.src.tiled && job.dst.tiled) return move_rows<kWords, TiledRows>(job, seed, at, partial);
  move_rows<kWords, ScatteredRows>(job, seed, at, partial);
}

// Converts 8 elements of kFrom bytes to kTo bytes, kDepth times; `convert` is convert8 of these dtypes. Returns which
// of the vectors hold something special: a bit each; those are not written.
template <int kFrom, int kTo, typename Rows, typename Convert>
HETKV_INLINE std::uint32_t convert_rows(const Job& job, std::uint64_t seed, const RowItem& at, const Rows& src,
                                        const Rows& dst, const Convert& convert, Partial& partial) {
  Vector<2 * kFrom> from[kDepth];
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) from[k] = load<2 * kFrom>(src[k]);
  const std::uint64_t key = row_key(job, seed, src, dst);
  std::uint32_t special = 0;
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    if (!at.has(k)) continue;
    Vector<2 * kTo> to;
    if (!convert(from[k], &to)) {
      special |= 1u << k;
      continue;
    }
    store<2 * kTo>(dst[k], to);
    const std::uint64_t token_key = key + k * job.step_key;
    if (job.wire == remap::WireSide::kDestination) partial.checksum += sum(to, token_key);
    if (job.wire == remap::WireSide::kSource) partial.checksum += sum(from[k], token_key);
  }
  return special;
}

// The vectors that convert_rows left.
template <typename Rows>
HETKV_INLINE void convert_specials(const Job& job, std::uint64_t seed, const Rows& src, const Rows& dst,
                                   std::uint32_t special, float multiplier, Partial& partial) {
  const int from_size = item_size(job.src.dtype);
  const int to_size = item_size(job.dst.dtype);
  const int wire_size = job.wire == remap::WireSide::kSource ? from_size : to_size;
  const std::uint64_t key = row_key(job, seed, src, dst);
  HETKV_ROLLED
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    if ((special >> k & 1) == 0) continue;
    const std::uint64_t in = src[k];
    const std::uint64_t out = dst[k];
    std::uint64_t word_key = key + k * job.step_key;
    std::uint64_t word = 0;
    HETKV_ROLLED
    for (int i = 0; i < static_cast<int>(kGroup); ++i) {
      const std::uint32_t code = load_element(in + static_cast<std::uint64_t>(i * from_size), from_size);
      const std::uint64_t converted = convert_one(job.src.dtype, job.dst.dtype, code, multiplier);
      const std::uint32_t result = static_cast<std::uint32_t>(converted);
      partial.saturated += static_cast<std::uint32_t>(converted >> 32);
      store_element(out + static_cast<std::uint64_t>(i * to_size), to_size, result);
      const int bits = 8 * wire_size * i % 64;
      word |= static_cast<std::uint64_t>(job.wire == remap::WireSide::kSource ? code : result) << bits;
      if (bits + 8 * wire_size < 64) continue;
      if (job.wire != remap::WireSide::kNone) partial.checksum += mix(word, word_key);
      word_key += remap::kChecksumStep;
      word = 0;
    }
  }
}

// Where every pair of dtypes has a loop of its own: for tokens in tiles, which is the usual case.
HETKV_INLINE void convert_tiled(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const RowItem at = row_item(job, item, kGroup);
  if (at.left == 0) return;
  TiledRows src(job.src, at);
  TiledRows dst(job.dst, at);
  src.wait();
  dst.wait();
  const float multiplier = job.multipliers != nullptr ? job.multipliers[at.head] : 1.0f;
  std::uint32_t special = 0;
  with_dtype(job.src.dtype, [&](auto from) {
    with_dtype(job.dst.dtype, [&](auto to) {
      constexpr int kFrom = item_size(decltype(from)::value), kTo = item_size(decltype(to)::value);
      const auto convert = [&](const Vector<2 * kFrom>& codes, Vector<2 * kTo>* result) {
        return convert8<decltype(from)::value, decltype(to)::value>(codes, multiplier, result);
      };
      special = convert_rows<kFrom, kTo>(job, seed, at, src, dst, convert, partial);
    });
  });
  if (special != 0) convert_specials(job, seed, src, dst, special, multiplier, partial);
}

// Where every pair of sizes has one: less code.
HETKV_INLINE void convert_item(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const RowItem at = row_item(job, item, kGroup);
  if (at.left == 0) return;
  ScatteredRows src(job.src, at);
  ScatteredRows dst(job.dst, at);
  src.wait();
  dst.wait();
  const float multiplier = job.multipliers != nullptr ? job.multipliers[at.head] : 1.0f;
  std::uint32_t special = 0;
  with_size(item_size(job.src.dtype), [&](auto from) {
    with_size(item_size(job.dst.dtype), [&](auto to) {
      constexpr int kFrom = decltype(from)::value, kTo = decltype(to)::value;
      const auto convert = [&](const Vector<2 * kFrom>& codes, Vector<2 * kTo>* result) {
        return convert8<kFrom, kTo>(job.src.dtype, job.dst.dtype, codes, multiplier, result);
      };
      special = convert_rows<kFrom, kTo>(job, seed, at, src, dst, convert, partial);
    });
  });
  if (special != 0) convert_specials(job, seed, src, dst, special, multiplier, partial);
}

}  // namespace hetkv::gpu
