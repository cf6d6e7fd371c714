// Conversions and the kernel table over a vector type `V`, for the translation units of AVX2 and AVX-512. Each defines
// HETKV_ISA and, in hetkv's unnamed namespace, `V` before including this header. V has kLanes 32-bit lanes: F floats, I
// integers, M a mask of lanes. The rules are those of convert.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "convert.h"
#include "remap/kernels.h"
#include "remap/transpose.h"

namespace hetkv::remap {
namespace {

using F = V::F;
using I = V::I;
using M = V::M;

template <DType kFrom>
inline F decode(const Bytes* at) {
  if constexpr (kFrom == DType::kInt8) return V::load_i8(at);
  if constexpr (kFrom == DType::kFloat32) return V::load_f32(at);
  if constexpr (kFrom == DType::kFloat16) return V::load_half(at);
  if constexpr (kFrom == DType::kBFloat16) return V::as_float(V::shift_left<16>(V::load_u16(at)));
  if constexpr (kFrom == DType::kFloat8E5M2) return V::load_e5m2(at);
  if constexpr (kFrom == DType::kFloat8E4M3FN || kFrom == DType::kFloat8E4M3FNUZ) {
    // The code's magnitude as half precision is the value times 2^(bias - 15).
    constexpr bool fn = kFrom == DType::kFloat8E4M3FN;
    const F half = V::load_e4m3_as_half(at);
    const F value = V::mul_float(half, V::set_float(fn ? 256.0f : 128.0f));
    const I bits = V::as_int(half);
    const M nan = fn ? V::equal(V::bit_and(bits, V::set(0x7FFFFFFF)), V::set(0x3FF00000))  // 1.875
                     : V::equal(bits, V::set(INT32_MIN));
    return V::as_float(V::select(nan, V::as_int(value), V::set(0x7FC00000)));
  }
  if constexpr (kFrom == DType::kFloat8E5M2FNUZ) {
    const I code = V::load_u8(at);
    const I magnitude = V::shift_left<21>(V::bit_and(code, V::set(0x7F)));
    const I normal = V::add(magnitude, V::set((127 - 16) << 23));
    // A subnormal's mantissa under exponent 1, less that exponent's leading bit.
    const I one = V::set((127 - 16 + 1) << 23);
    const F subnormal = V::sub_float(V::as_float(V::add(magnitude, one)), V::as_float(one));
    const I value = V::select(V::greater(V::set(1 << 23), magnitude), normal, V::as_int(subnormal));
    const I sign = V::shift_left<24>(V::bit_and(code, V::set(0x80)));
    return V::as_float(V::select(V::equal(code, V::set(0x80)), V::bit_or(value, sign), V::set(0x7FC00000)));
  }
}

// Largest float32 magnitude, as bits, that still rounds to the format's largest finite value.
template <DType kTo>
constexpr std::int32_t last_fitting() {
  if constexpr (kTo == DType::kFloat16) return 0x477FEFFF;         // below 65520
  if constexpr (kTo == DType::kBFloat16) return 0x7F7F7FFF;        // below the largest + half a unit
  if constexpr (kTo == DType::kFloat8E4M3FN) return 0x43E80000;    // 464 rounds to the even 448
  if constexpr (kTo == DType::kFloat8E4M3FNUZ) return 0x4377FFFF;  // below 248
  if constexpr (kTo == DType::kFloat8E5M2 || kTo == DType::kFloat8E5M2FNUZ) return 0x476FFFFF;  // below 61440
  if constexpr (kTo == DType::kInt8) return 0x42FEFFFF;                                         // below 127.5
  return 0x7F7FFFFF;
}

template <DType kTo>
constexpr std::int32_t largest_bits() {
  if constexpr (kTo == DType::kInt8) return 0x42FE0000;  // 127
  constexpr FloatFormat format = format_of(kTo);
  return static_cast<std::int32_t>((format.largest << (23 - format.mantissa_bits)) +
                                   (static_cast<std::uint32_t>(127 - format.bias) << 23));
}

// Codes of lanes whose magnitude fits; `magnitude` and `sign` (bit 31) are the float32's parts.
template <DType kTo>
inline I round_to(I magnitude, I sign) {
  constexpr FloatFormat format = format_of(kTo);
  constexpr int drop = 23 - format.mantissa_bits;
  if constexpr (kTo == DType::kFloat32) {
    return V::bit_or(magnitude, sign);
  } else if constexpr (kTo == DType::kInt8) {
    return V::bit_and(V::round(V::as_float(V::bit_or(magnitude, sign))), V::set(0xFF));
  } else if constexpr (kTo == DType::kFloat16) {
    return V::half_codes(V::as_float(V::bit_or(magnitude, sign)));
  } else {
    constexpr std::int32_t rebias = (127 - format.bias) << 23;
    const I odd = V::bit_and(V::shift_right<drop>(magnitude), V::set(1));
    const I normal = V::shift_right<drop>(V::add(V::add(magnitude, V::set((1 << (drop - 1)) - 1 - rebias)), odd));
    if constexpr (kTo == DType::kBFloat16) {
      return V::bit_or(normal, V::shift_right<16>(sign));
    } else {
      // Adding 2^23 units of the subnormal leaves the rounded count of units in the low bits.
      constexpr std::int32_t magic = (127 + 24 - format.bias - format.mantissa_bits) << 23;
      const I units =
          V::add(V::as_int(V::add_float(V::as_float(magnitude), V::as_float(V::set(magic)))), V::set(-magic));
      I code = V::select(V::greater(V::set(rebias + (1 << 23)), magnitude), normal, units);
      const I top = V::shift_right<24>(sign);
      if constexpr (format.fnuz) return V::select(V::equal(code, V::set(0)), V::bit_or(code, top), code);
      return V::bit_or(code, top);
    }
  }
}

template <DType kTo>
inline I encode(F value, std::int64_t& saturated) {
  const I bits = V::as_int(value);
  const I sign = V::bit_and(bits, V::set(INT32_MIN));
  I magnitude = V::bit_and(bits, V::set(0x7FFFFFFF));
  const M special = V::greater(magnitude, V::set(last_fitting<kTo>()));
  if (__builtin_expect(!V::any(special), 1)) return round_to<kTo>(magnitude, sign);
  const M nan = V::greater(magnitude, V::set(0x7F800000));
  saturated += V::count(special);
  magnitude = V::select(special, magnitude, V::set(largest_bits<kTo>()));
  if constexpr (kTo == DType::kInt8) return V::select(nan, round_to<kTo>(magnitude, sign), V::set(0));
  saturated -= V::count(nan);
  return V::select(nan, round_to<kTo>(magnitude, sign), V::set(static_cast<std::int32_t>(format_of(kTo).nan)));
}

template <DType kFrom, DType kTo>
inline void convert_vector(Bytes* dst, const Bytes* src, F multiplier, std::int64_t& saturated) {
  const I code = encode<kTo>(V::mul_float(decode<kFrom>(src), multiplier), saturated);
  constexpr int size = item_size(kTo);
  if constexpr (size == 4) V::store_u32(dst, code);
  if constexpr (size == 2) V::store_u16(dst, code);
  if constexpr (size == 1) V::store_u8(dst, code);
}

template <DType kFrom, DType kTo>
std::uint64_t convert_rows(const Rows& rows, std::int64_t count, const float* multipliers, std::int64_t step_of_row) {
  constexpr int from = item_size(kFrom);
  constexpr int to = item_size(kTo);
  constexpr int lanes = V::kLanes;
  constexpr int step = 64 / (from < to ? from : to);  // elements of a line of the narrower side
  std::int64_t saturated = 0;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const F factor = V::set_float(multipliers[r * step_of_row]);
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    std::int64_t left = count;
    for (; left >= step; left -= step, in += step * from, out += step * to) {
      for (int at = 0; at < step * from; at += 64) __builtin_prefetch(in + at + rows.src_ahead);
      for (int at = 0; at < step * to; at += 64) __builtin_prefetch(out + at + rows.dst_ahead, 1);
#pragma GCC unroll 8
      for (int at = 0; at < step; at += lanes) {
        convert_vector<kFrom, kTo>(out + at * to, in + at * from, factor, saturated);
      }
    }
    for (; left >= lanes; left -= lanes, in += lanes * from, out += lanes * to) {
      convert_vector<kFrom, kTo>(out, in, factor, saturated);
    }
    if (left > 0) {
      Bytes from_tail[lanes * from] = {};
      Bytes to_tail[lanes * to];
      std::memcpy(from_tail, in, static_cast<std::size_t>(left * from));
      convert_vector<kFrom, kTo>(to_tail, from_tail, factor, saturated);
      std::memcpy(out, to_tail, static_cast<std::size_t>(left * to));
      if constexpr (kTo == DType::kInt8) {
        // Lanes past the row hold 0. A multiplier that is not finite makes them NaN, which counts in int8.
        const bool counted = !(0.0f * multipliers[r * step_of_row] == 0.0f);
        if (counted) saturated -= lanes - left;
      }
    }
  }
  return static_cast<std::uint64_t>(saturated);
}

// Bits of the magnitudes, whose order as integers is that of the magnitudes; 0 for NaN.
template <DType kFrom>
inline I magnitude_of(const Bytes* at) {
  const I magnitude = V::bit_and(V::as_int(decode<kFrom>(at)), V::set(0x7FFFFFFF));
  return V::select(V::greater(magnitude, V::set(0x7F800000)), magnitude, V::set(0));
}

template <DType kFrom>
void amax_rows(const Rows& rows, std::int64_t count, float* amax) {
  constexpr int size = item_size(kFrom);
  constexpr int lanes = V::kLanes;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    I even = V::as_int(V::set_float(amax[r]));
    I odd = even;
    std::int64_t left = count;
    for (; left >= 2 * lanes; left -= 2 * lanes, in += 2 * lanes * size) {
      __builtin_prefetch(in + rows.src_ahead);
      even = V::max(even, magnitude_of<kFrom>(in));
      odd = V::max(odd, magnitude_of<kFrom>(in + lanes * size));
    }
    if (left >= lanes) {
      even = V::max(even, magnitude_of<kFrom>(in));
      left -= lanes;
      in += lanes * size;
    }
    if (left > 0) {
      Bytes tail[lanes * size] = {};
      std::memcpy(tail, in, static_cast<std::size_t>(left * size));
      odd = V::max(odd, magnitude_of<kFrom>(tail));
    }
    std::int32_t found[lanes];
    V::store_u32(reinterpret_cast<Bytes*>(found), V::max(even, odd));
    std::int32_t most = found[0];
    for (int i = 1; i < lanes; ++i) most = found[i] > most ? found[i] : most;
    std::memcpy(amax + r, &most, 4);
  }
}

template <DType kFrom>
constexpr void fill_row(Kernels& set) {
  auto& row = set.convert_rows[static_cast<int>(kFrom) - 1];
  row[0] = convert_rows<kFrom, DType::kFloat32>;
  row[1] = convert_rows<kFrom, DType::kFloat16>;
  row[2] = convert_rows<kFrom, DType::kBFloat16>;
  row[3] = convert_rows<kFrom, DType::kFloat8E4M3FN>;
  row[4] = convert_rows<kFrom, DType::kFloat8E4M3FNUZ>;
  row[5] = convert_rows<kFrom, DType::kFloat8E5M2>;
  row[6] = convert_rows<kFrom, DType::kFloat8E5M2FNUZ>;
  row[7] = convert_rows<kFrom, DType::kInt8>;
  set.amax_rows[static_cast<int>(kFrom) - 1] = amax_rows<kFrom>;
}

constexpr Kernels make_kernels(const char* name) {
  Kernels set{name, copy_rows, copy_rows_sum, {transpose<1>, transpose<2>, transpose<4>, transpose<8>, transpose<16>},
              {},   {},        checksum};
  fill_row<DType::kFloat32>(set);
  fill_row<DType::kFloat16>(set);
  fill_row<DType::kBFloat16>(set);
  fill_row<DType::kFloat8E4M3FN>(set);
  fill_row<DType::kFloat8E4M3FNUZ>(set);
  fill_row<DType::kFloat8E5M2>(set);
  fill_row<DType::kFloat8E5M2FNUZ>(set);
  fill_row<DType::kInt8>(set);
  return set;
}

}  // namespace
}  // namespace hetkv::remap
