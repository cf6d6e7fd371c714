// Blocked transposes from 16-byte rows (SSE2), included by the translation unit of every instruction set; plain loops
// where there is no SSE2. Contract: Kernels::transpose.
#pragma once

#include <cstdint>
#include <cstring>

#include "remap/kernels.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace hetkv {
namespace {

template <int kSize>
inline void transpose_scalar(Bytes* dst, const Bytes* src, std::int64_t rows, std::int64_t cols,
                             std::int64_t dst_stride, std::int64_t src_stride) {
  for (std::int64_t c = 0; c < cols; ++c) {
    for (std::int64_t r = 0; r < rows; ++r) {
      std::memcpy(dst + c * dst_stride + r * kSize, src + r * src_stride + c * kSize, kSize);
    }
  }
}

#if defined(__x86_64__)

inline __m128i load16(const Bytes* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}
inline void store16(Bytes* at, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), value);
}

// One round of a transpose of n rows: interleaves row i with row i + n/2. log2(n) rounds transpose.
template <int kSize>
inline __m128i interleave_low(__m128i a, __m128i b) {
  if constexpr (kSize == 1) return _mm_unpacklo_epi8(a, b);
  if constexpr (kSize == 2) return _mm_unpacklo_epi16(a, b);
  if constexpr (kSize == 4) return _mm_unpacklo_epi32(a, b);
  return _mm_unpacklo_epi64(a, b);
}
template <int kSize>
inline __m128i interleave_high(__m128i a, __m128i b) {
  if constexpr (kSize == 1) return _mm_unpackhi_epi8(a, b);
  if constexpr (kSize == 2) return _mm_unpackhi_epi16(a, b);
  if constexpr (kSize == 4) return _mm_unpackhi_epi32(a, b);
  return _mm_unpackhi_epi64(a, b);
}

template <int kSize>
inline void transpose_tile(Bytes* dst, const Bytes* src, std::int64_t dst_stride, std::int64_t src_stride) {
  constexpr int kRows = 16 / kSize;
  __m128i a[kRows], b[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) a[i] = load16(src + i * src_stride);
#pragma GCC unroll 4
  for (int round = kRows; round > 1; round /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) {
      b[2 * i] = interleave_low<kSize>(a[i], a[i + kRows / 2]);
      b[2 * i + 1] = interleave_high<kSize>(a[i], a[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) store16(dst + i * dst_stride, a[i]);
}

// Tiles of whole 64-byte lines on both sides, so that each line is finished while it is in the first cache.
template <int kSize>
void transpose(const Rows& rows, std::int64_t cols) {
  constexpr std::int64_t kTile = 16 / kSize;
  constexpr std::int64_t kLine = 64 / kSize;
  const std::int64_t whole_rows = rows.count - rows.count % kTile;
  const std::int64_t whole_cols = cols - cols % kTile;
  for (std::int64_t c0 = 0; c0 < whole_cols; c0 += kLine) {
    const std::int64_t c1 = c0 + kLine < whole_cols ? c0 + kLine : whole_cols;
    for (std::int64_t r0 = 0; r0 < whole_rows; r0 += kLine) {
      const std::int64_t r1 = r0 + kLine < whole_rows ? r0 + kLine : whole_rows;
      Bytes* const dst = rows.dst + r0 * kSize;
      const Bytes* const src = rows.src + c0 * kSize;
      for (std::int64_t r = r0; r < r1; ++r) __builtin_prefetch(src + r * rows.src_step + rows.src_ahead);
      for (std::int64_t c = c0; c < c1; c += kTile) {
        for (std::int64_t i = c; i < c + kTile; ++i) __builtin_prefetch(dst + i * rows.dst_step + rows.dst_ahead, 1);
        for (std::int64_t r = r0; r < r1; r += kTile) {
          transpose_tile<kSize>(rows.dst + c * rows.dst_step + r * kSize, rows.src + r * rows.src_step + c * kSize,
                                rows.dst_step, rows.src_step);
        }
      }
    }
  }
  transpose_scalar<kSize>(rows.dst + whole_rows * kSize, rows.src + whole_rows * rows.src_step, rows.count - whole_rows,
                          whole_cols, rows.dst_step, rows.src_step);
  transpose_scalar<kSize>(rows.dst + whole_cols * rows.dst_step, rows.src + whole_cols * kSize, rows.count,
                          cols - whole_cols, rows.dst_step, rows.src_step);
}

#else

template <int kSize>
void transpose(const Rows& rows, std::int64_t cols) {
  constexpr std::int64_t kTile = 16;
  for (std::int64_t c = 0; c < cols; c += kTile) {
    for (std::int64_t r = 0; r < rows.count; r += kTile) {
      transpose_scalar<kSize>(rows.dst + c * rows.dst_step + r * kSize, rows.src + r * rows.src_step + c * kSize,
                              rows.count - r < kTile ? rows.count - r : kTile, cols - c < kTile ? cols - c : kTile,
                              rows.dst_step, rows.src_step);
    }
  }
}

#endif

}  // namespace
}  // namespace hetkv
