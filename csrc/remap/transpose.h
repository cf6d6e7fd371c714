// Blocked transposes from 16-byte rows (SSE2, or pairs of them where the unit has AVX2), included by the translation
// unit of every instruction set; plain loops where there is no SSE2. Contract: Kernels::transpose.
#pragma once

#include <cstdint>
#include <cstring>

#include "remap/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hetkv::remap {
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

// 16 bytes of one row, and with AVX2 of the row that is kRows below it in the other half.
template <int kSize>
struct Narrow {
  using Type = __m128i;
  static constexpr int kRows = 16 / kSize;
  static Type load(const Bytes* at, std::int64_t) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static void store(Bytes* at, Type value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), value); }
  static Type low(Type a, Type b) {
    if constexpr (kSize == 1) return _mm_unpacklo_epi8(a, b);
    if constexpr (kSize == 2) return _mm_unpacklo_epi16(a, b);
    if constexpr (kSize == 4) return _mm_unpacklo_epi32(a, b);
    return _mm_unpacklo_epi64(a, b);
  }
  static Type high(Type a, Type b) {
    if constexpr (kSize == 1) return _mm_unpackhi_epi8(a, b);
    if constexpr (kSize == 2) return _mm_unpackhi_epi16(a, b);
    if constexpr (kSize == 4) return _mm_unpackhi_epi32(a, b);
    return _mm_unpackhi_epi64(a, b);
  }
};

#if defined(__AVX2__)
template <int kSize>
struct Wide {
  using Type = __m256i;
  static constexpr int kRows = 32 / kSize;
  static Type load(const Bytes* at, std::int64_t src_step) {
    const auto* below = reinterpret_cast<const __m128i*>(at + kRows / 2 * src_step);
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm_loadu_si128(below), 1);
  }
  static void store(Bytes* at, Type value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }
  static Type low(Type a, Type b) {
    if constexpr (kSize == 1) return _mm256_unpacklo_epi8(a, b);
    if constexpr (kSize == 2) return _mm256_unpacklo_epi16(a, b);
    if constexpr (kSize == 4) return _mm256_unpacklo_epi32(a, b);
    return _mm256_unpacklo_epi64(a, b);
  }
  static Type high(Type a, Type b) {
    if constexpr (kSize == 1) return _mm256_unpackhi_epi8(a, b);
    if constexpr (kSize == 2) return _mm256_unpackhi_epi16(a, b);
    if constexpr (kSize == 4) return _mm256_unpackhi_epi32(a, b);
    return _mm256_unpackhi_epi64(a, b);
  }
};
#else
template <int kSize>
using Wide = Narrow<kSize>;
#endif

// R::kRows rows by 16 bytes. A round interleaves row i with row i + n/2 of each half; log2(n) rounds transpose.
template <int kSize, typename R>
inline void transpose_tile(Bytes* dst, const Bytes* src, std::int64_t dst_step, std::int64_t src_step) {
  constexpr int kCols = 16 / kSize;
  typename R::Type a[kCols], b[kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kCols; ++i) a[i] = R::load(src + i * src_step, src_step);
#pragma GCC unroll 4
  for (int round = kCols; round > 1; round /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCols / 2; ++i) {
      b[2 * i] = R::low(a[i], a[i + kCols / 2]);
      b[2 * i + 1] = R::high(a[i], a[i + kCols / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCols; ++i) R::store(dst + i * dst_step, a[i]);
}

// Tiles of whole 64-byte lines on both sides, so that each line is finished while it is in the first cache.
template <int kSize>
void transpose(const Rows& rows, std::int64_t cols) {
  constexpr std::int64_t kTile = Narrow<kSize>::kRows;
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
        Bytes* out = rows.dst + c * rows.dst_step;
        const Bytes* in = rows.src + c * kSize;
        std::int64_t r = r0;
        for (; r + Wide<kSize>::kRows <= r1; r += Wide<kSize>::kRows) {
          transpose_tile<kSize, Wide<kSize>>(out + r * kSize, in + r * rows.src_step, rows.dst_step, rows.src_step);
        }
        for (; r < r1; r += kTile) {
          transpose_tile<kSize, Narrow<kSize>>(out + r * kSize, in + r * rows.src_step, rows.dst_step, rows.src_step);
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
}  // namespace hetkv::remap
