// The inner loops of remap_cpu, once for each instruction set. remap.cpp decides what to move; these only move.
// Translation units built for a wide instruction set include no inline function of another header: the linker could
// keep their copy for every caller.
#pragma once

#include <cstdint>

#include "map.h"

namespace hetkv::remap {

using Bytes = unsigned char;
constexpr int kNumValues = 8;  // DType codes 1 to 8: the floats, and int8 where it has scales

// Rows on both sides: row r goes from src + r * src_step to dst + r * dst_step. What is `dst_ahead` and `src_ahead`
// bytes further is what the caller will move next: kernels prefetch it line by line as they go (0: nothing to
// prefetch).
struct Rows {
  Bytes* dst;
  const Bytes* src;
  std::int64_t count;
  std::int64_t dst_step;
  std::int64_t src_step;
  std::int64_t dst_ahead;
  std::int64_t src_ahead;
};

struct Kernels {
  const char* name;

  // Rows of `bytes` bytes.
  void (*copy_rows)(const Rows& rows, std::int64_t bytes);

  // The same, and the checksum of the rows: word w of row r has index `index + r * index_step + w`. `bytes` is a
  // multiple of 8.
  std::uint64_t (*copy_rows_sum)(const Rows& rows, std::int64_t bytes, std::uint64_t index, std::uint64_t index_step,
                                 std::uint64_t seed);

  // Elements of 1 << i bytes (up to 16): element (r, c) goes from src + r * src_step + c * size to
  // dst + c * dst_step + r * size, for `cols` columns.
  void (*transpose[5])(const Rows& rows, std::int64_t cols);

  // Rows of `count` elements, from DType code s + 1 to d + 1. Row r is multiplied by multipliers[r * step]; `step` is 0
  // where one multiplier serves all rows, or 1. Returns how many saturated.
  std::uint64_t (*convert_rows[kNumValues][kNumValues])(const Rows& rows, std::int64_t count, const float* multipliers,
                                                        std::int64_t step);

  // amax[r] becomes at least the largest magnitude in row r of the source, NaN not counted; DType code s + 1. Nothing
  // is written to `rows.dst`.
  void (*amax_rows[kNumValues])(const Rows& rows, std::int64_t count, float* amax);

  // Sum of checksum_mix over `bytes` bytes whose first word has index `index`; the last word is padded with zeros.
  std::uint64_t (*checksum)(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;    // AVX2, F16C, FMA
extern const Kernels kAvx512Kernels;  // AVX-512 F, BW, VL, DQ, VBMI
#endif

// Checksum of fewer than 8 bytes, out of line for the wide translation units' tails.
std::uint64_t checksum_word(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed) noexcept;

}  // namespace hetkv::remap
