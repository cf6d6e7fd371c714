// Kernels that every CPU of the build's architecture runs: the C library's copies, scalar conversions.
#include <cstring>
#include <utility>

#include "convert.h"
#include "remap/checksum.h"
#include "remap/kernels.h"
#include "remap/transpose.h"

namespace hetkv::remap {

std::uint64_t checksum_word(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed) noexcept {
  std::uint64_t word = 0;
  std::memcpy(&word, data, static_cast<std::size_t>(bytes));
  return checksum_mix(word, index, seed);
}

namespace {

constexpr DType dtype_at(std::size_t i) {
  return static_cast<DType>(i + 1);
}

void copy_rows(const Rows& rows, std::int64_t bytes) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    std::memcpy(rows.dst + r * rows.dst_step, rows.src + r * rows.src_step, static_cast<std::size_t>(bytes));
  }
}

std::uint64_t checksum(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed) {
  std::uint64_t sum = 0;
  for (; bytes >= 8; bytes -= 8, data += 8, ++index) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    sum += checksum_mix(word, index, seed);
  }
  return bytes > 0 ? sum + checksum_word(data, bytes, index, seed) : sum;
}

std::uint64_t copy_rows_sum(const Rows& rows, std::int64_t bytes, std::uint64_t index, std::uint64_t index_step,
                            std::uint64_t seed) {
  std::uint64_t sum = 0;
  for (std::int64_t r = 0; r < rows.count; ++r, index += index_step) {
    Bytes* out = rows.dst + r * rows.dst_step;
    std::memcpy(out, rows.src + r * rows.src_step, static_cast<std::size_t>(bytes));
    sum += checksum(out, bytes, index, seed);
  }
  return sum;
}

template <std::size_t kType>
float read_value(std::uint32_t code) {
  constexpr DType dtype = dtype_at(kType);
  constexpr FloatFormat format = format_of(dtype);
  return dtype == DType::kInt8 ? decode_scaled(dtype, code) : decode(format, code);
}

template <std::size_t kSrc, std::size_t kDst>
std::uint64_t convert_rows(const Rows& rows, std::int64_t count, const float* multipliers, std::int64_t step) {
  constexpr DType to = dtype_at(kDst);
  constexpr FloatFormat format = format_of(to);
  constexpr int from_size = item_size(dtype_at(kSrc));
  constexpr int to_size = item_size(to);
  std::uint64_t saturated = 0;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    const float multiplier = multipliers[r * step];
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint32_t code = 0;  // little-endian
      std::memcpy(&code, in + i * from_size, from_size);
      bool clamped;
      const float value = read_value<kSrc>(code) * multiplier;
      code = to == DType::kInt8 ? encode_scaled(to, value, &clamped) : encode(format, value, &clamped);
      std::memcpy(out + i * to_size, &code, to_size);
      saturated += clamped;
    }
  }
  return saturated;
}

template <std::size_t kSrc>
void amax_rows(const Rows& rows, std::int64_t count, float* amax) {
  constexpr int size = item_size(dtype_at(kSrc));
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    for (std::int64_t i = 0; i < count; ++i) {
      std::uint32_t code = 0;
      std::memcpy(&code, in + i * size, size);
      const float value = float_from_bits(bits_of(read_value<kSrc>(code)) & 0x7FFFFFFFu);
      if (value > amax[r]) amax[r] = value;  // false for NaN
    }
  }
}

template <std::size_t... kPair>
constexpr Kernels make_kernels(std::index_sequence<kPair...>) {
  Kernels set{
      "baseline", copy_rows, copy_rows_sum, {transpose<1>, transpose<2>, transpose<4>, transpose<8>, transpose<16>},
      {},         {},        checksum};
  ((set.convert_rows[kPair / kNumValues][kPair % kNumValues] = convert_rows<kPair / kNumValues, kPair % kNumValues>),
   ...);
  ((set.amax_rows[kPair / kNumValues] = amax_rows<kPair / kNumValues>), ...);
  return set;
}

}  // namespace

const Kernels kBaselineKernels = make_kernels(std::make_index_sequence<kNumValues * kNumValues>());

}  // namespace hetkv::remap
