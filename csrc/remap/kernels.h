// The inner loops of remap_cpu, once for each instruction set. remap.cpp decides what to move; these only move.
// Translation units built for a wide instruction set include no inline function of another header: the linker could
// keep their copy for every caller.
#pragma once

#include <cstdint>

#include "map.h"

namespace hetkv {

using Bytes = unsigned char;
constexpr int kNumFloats = 7;  // DType codes 1 to 7

struct Kernels {
  const char* name;

  // `rows` runs of `bytes` bytes; run r goes from src + r * src_stride to dst + r * dst_stride.
  void (*copy_rows)(Bytes* dst, const Bytes* src, std::int64_t rows, std::int64_t dst_stride, std::int64_t src_stride,
                    std::int64_t bytes);

  // The same, and the checksum of the runs: word w of run r has index `index + r * index_step + w`. `bytes` is a
  // multiple of 8.
  std::uint64_t (*copy_rows_sum)(Bytes* dst, const Bytes* src, std::int64_t rows, std::int64_t dst_stride,
                                 std::int64_t src_stride, std::int64_t bytes, std::uint64_t index,
                                 std::uint64_t index_step, std::uint64_t seed);

  // Elements of 1 << i bytes (up to 16): element (r, c) goes from src + r * src_stride + c * size to
  // dst + c * dst_stride + r * size.
  void (*transpose[5])(Bytes* dst, const Bytes* src, std::int64_t rows, std::int64_t cols, std::int64_t dst_stride,
                       std::int64_t src_stride);

  // `rows` runs of `count` elements, from DType code s + 1 to d + 1, times `multiplier`. Returns how many saturated.
  std::uint64_t (*convert_rows[kNumFloats][kNumFloats])(Bytes* dst, const Bytes* src, std::int64_t rows,
                                                        std::int64_t dst_stride, std::int64_t src_stride,
                                                        std::int64_t count, float multiplier);

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

}  // namespace hetkv
