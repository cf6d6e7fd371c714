// The path of layouts that turn the axes round: a thread takes a cell of 8 tokens x 8 channels, reads it in runs along
// the source's axis, turns it in registers, and writes runs along the destination's.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"

namespace hetkv::gpu {

struct Cell {
  std::uint32_t head;
  std::uint32_t channel;  // first
  std::int64_t token;     // first; below 0 where the cell begins before the job
};

// Items in order: tile of cells along the tokens, head, group of channels, cell; the last changes from lane to lane.
HETKV_INLINE Cell cell_of(const Job& job, std::uint32_t item) {
  Cell cell;
  const std::uint32_t lane = item & ((1u << job.log_lane_tokens) - 1);
  item >>= job.log_lane_tokens;
  cell.channel = job.lane_vectors.split(item) * kGroup;
  cell.head = job.heads.split(item);
  cell.token = (static_cast<std::int64_t>(item) << job.log_lane_tokens | lane) * kGroup - job.lead;
  return cell;
}

// Address of the cell's first channel at 8 contiguous tokens; `token` may be before the job's first, but in the
// same block.
HETKV_INLINE std::uint64_t token_run(const Side& side, const Cell& cell) {
  return head_channel(side, cell.head, cell.channel) + token_offset(side, static_cast<std::uint32_t>(cell.token));
}

// Two words of halves: the low ones, the high ones.
HETKV_INLINE std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) {
  return (a & 0xFFFFu) | b << 16;
}
HETKV_INLINE std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) {
  return a >> 16 | (b & 0xFFFF0000u);
}

// Bytes 0 and 1 of two words, or bytes 2 and 3, in turn.
HETKV_INLINE std::uint32_t low_bytes(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x5140);
#else
  return (a & 0xFFu) | (b & 0xFFu) << 8 | (a & 0xFF00u) << 8 | (b & 0xFF00u) << 16;
#endif
}
HETKV_INLINE std::uint32_t high_bytes(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x7362);
#else
  return low_bytes(a >> 16, b >> 16);
#endif
}

// Element j of row i becomes element i of row j.
template <int kSize>
HETKV_INLINE void transpose(const Vector<2 * kSize> (&in)[kGroup], Vector<2 * kSize> (&out)[kGroup]) {
  if constexpr (kSize == 4) {
    HETKV_UNROLL
    for (int i = 0; i < 8; ++i) {
      HETKV_UNROLL
      for (int j = 0; j < 8; ++j) out[j].w[i] = in[i].w[j];
    }
  } else if constexpr (kSize == 2) {
    HETKV_UNROLL
    for (int i = 0; i < 8; i += 2) {
      HETKV_UNROLL
      for (int j = 0; j < 8; j += 2) {
        out[j].w[i / 2] = low_halves(in[i].w[j / 2], in[i + 1].w[j / 2]);
        out[j + 1].w[i / 2] = high_halves(in[i].w[j / 2], in[i + 1].w[j / 2]);
      }
    }
  } else {
    HETKV_UNROLL
    for (int i = 0; i < 8; i += 4) {
      HETKV_UNROLL
      for (int j = 0; j < 8; j += 4) {
        const std::uint32_t a = in[i].w[j / 4], b = in[i + 1].w[j / 4], c = in[i + 2].w[j / 4], d = in[i + 3].w[j / 4];
        const std::uint32_t ab = low_bytes(a, b), cd = low_bytes(c, d), ab2 = high_bytes(a, b), cd2 = high_bytes(c, d);
        out[j].w[i / 4] = low_halves(ab, cd);
        out[j + 1].w[i / 4] = high_halves(ab, cd);
        out[j + 2].w[i / 4] = low_halves(ab2, cd2);
        out[j + 3].w[i / 4] = high_halves(ab2, cd2);
      }
    }
  }
}

// Moves a cell whose 8 tokens all belong to the job. False, with nothing done, where a conversion meets something
// special.
template <int kFrom, int kTo, bool kConverts>
HETKV_INLINE bool move_cell(const Job& job, std::uint64_t seed, const Cell& cell, Partial& partial) {
  const std::uint32_t token = static_cast<std::uint32_t>(cell.token);
  const Side& rows = job.tokens_first ? job.dst : job.src;  // the side whose channels are contiguous
  const Side& turned = job.tokens_first ? job.src : job.dst;
  const std::uint64_t run = token_run(turned, cell);
  const std::uint64_t row = head_channel(rows, cell.head, cell.channel);
  const std::uint64_t first = row + token_offset(rows, token);
  const auto at = [&](bool tokens_contiguous, std::uint32_t i) {
    if (tokens_contiguous) return run + times(i, turned.inner_stride);
    return rows.tiled ? first + times(i, rows.token_stride) : row + token_offset(rows, token + i);
  };
  Vector<2 * kFrom> in[kGroup];
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) in[i] = load_with_line<2 * kFrom>(at(job.tokens_first, i));
  Vector<2 * kTo> mid[kGroup];
  if constexpr (kConverts) {
    const float multiplier = job.multipliers != nullptr ? job.multipliers[cell.head] : 1.0f;
    bool plain = true;
    HETKV_UNROLL
    for (std::uint32_t i = 0; i < kGroup; ++i) {
      plain &= convert8<kFrom, kTo>(job.src.dtype, job.dst.dtype, in[i], multiplier, &mid[i]);
    }
    if (!plain) return false;
  } else {
    HETKV_UNROLL
    for (std::uint32_t i = 0; i < kGroup; ++i) mid[i] = in[i];
  }
  Vector<2 * kTo> out[kGroup];
  transpose<kTo>(mid, out);
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) store<2 * kTo>(at(!job.tokens_first, i), out[i]);
  if (job.wire == remap::WireSide::kNone) return true;
  // Only the side of rows can be the wire's.
  std::uint64_t key = word_key(job, seed, first);
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) {
    partial.checksum += job.tokens_first ? sum(out[i], key) : sum(in[i], key);
    key += job.token_key;
  }
  return true;
}

// Any cell, element by element: those at the job's ends, and those that move_cell leaves.
HETKV_INLINE void move_cell_slowly(const Job& job, std::uint64_t seed, const Cell& cell, Partial& partial) {
  const int from_size = item_size(job.src.dtype);
  const int to_size = item_size(job.dst.dtype);
  const int wire_size = job.wire == remap::WireSide::kSource ? from_size : to_size;
  const float multiplier = job.multipliers != nullptr ? job.multipliers[cell.head] : 1.0f;
  const std::uint64_t wire_row = head_channel(job.tokens_first ? job.dst : job.src, cell.head, cell.channel);
  HETKV_ROLLED
  for (std::int64_t t = cell.token < 0 ? 0 : cell.token; t < cell.token + kGroup && t < job.tokens; ++t) {
    const std::uint32_t token = static_cast<std::uint32_t>(t);
    const std::uint64_t src = token_offset(job.src, token);
    const std::uint64_t dst = token_offset(job.dst, token);
    // Only the side of rows can be the wire's.
    std::uint64_t key = word_key(job, seed, wire_row + (job.tokens_first ? dst : src));
    std::uint64_t word = 0;
    HETKV_ROLLED
    for (int i = 0; i < static_cast<int>(kGroup); ++i) {
      const std::uint32_t channel = cell.channel + static_cast<std::uint32_t>(i);
      const std::uint32_t code = load_element(src + head_channel(job.src, cell.head, channel), from_size);
      std::uint32_t result = code;
      if (job.converts) {
        const std::uint64_t converted = convert_one(job.src.dtype, job.dst.dtype, code, multiplier);
        result = static_cast<std::uint32_t>(converted);
        partial.saturated += static_cast<std::uint32_t>(converted >> 32);
      }
      store_element(dst + head_channel(job.dst, cell.head, channel), to_size, result);
      const int bits = 8 * wire_size * i % 64;
      word |= static_cast<std::uint64_t>(job.wire == remap::WireSide::kSource ? code : result) << bits;
      if (bits + 8 * wire_size < 64) continue;
      if (job.wire != remap::WireSide::kNone) partial.checksum += mix(word, key);
      key += remap::kChecksumStep;
      word = 0;
    }
  }
}

template <bool kAll>
HETKV_INLINE void turn_cell(const Job& job, std::uint64_t seed, std::uint32_t item, Partial& partial) {
  const Cell cell = cell_of(job, item);
  if (cell.token >= static_cast<std::int64_t>(job.tokens)) return;
  bool done = false;
  if (cell.token >= 0 && cell.token + kGroup <= static_cast<std::int64_t>(job.tokens)) {
    const int size = item_size(job.src.dtype);
    if constexpr (kAll) {
      with_size(size, [&](auto from) {
        constexpr int bytes = decltype(from)::value;
        if (!job.converts) {
          done = move_cell<bytes, bytes, false>(job, seed, cell, partial);
          return;
        }
        with_size(item_size(job.dst.dtype),
                  [&](auto to) { done = move_cell<bytes, decltype(to)::value, true>(job, seed, cell, partial); });
      });
    } else {
      done = size == 2 ? move_cell<2, 2, false>(job, seed, cell, partial)
                       : move_cell<1, 1, false>(job, seed, cell, partial);
    }
  }
  if (!done) move_cell_slowly(job, seed, cell, partial);
}

}  // namespace hetkv::gpu
