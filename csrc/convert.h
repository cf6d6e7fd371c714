// Scalar conversions between the wire's float formats: the definition that every vector kernel and GPU kernel must
// match.
//
// Reading is exact into float32. Writing rounds to nearest even as if the exponent had no upper bound; a magnitude that
// is then above the format's largest finite value, infinity included, becomes that value and counts as saturated. Every
// NaN becomes the format's one canonical NaN. The fnuz formats have no negative zero: a result that rounds to zero is
// +0.
//
// Code outside the portable build (other instruction sets) defines HETKV_ISA before including this header, so that its
// copies of these functions have names of their own.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "map.h"

#ifndef HETKV_ISA
#define HETKV_ISA portable
#endif

// The library's functions are the host's alone for HIP.
#if defined(__HIP__)
#define HETKV_COPY_BITS __builtin_memcpy
#define HETKV_RINT __builtin_rintf
#else
#define HETKV_COPY_BITS std::memcpy
#define HETKV_RINT rintf
#endif

namespace hetkv {
inline namespace HETKV_ISA {

// One binary format below float32: a sign, `exponent_bits`, `mantissa_bits`, and what its codes at the top mean.
struct FloatFormat {
  int mantissa_bits;
  int bias;
  std::uint32_t sign;      // the sign bit of a code
  std::uint32_t largest;   // code of the largest finite value
  std::uint32_t nan;       // the canonical NaN
  std::uint32_t infinity;  // code of infinity, 0 where there is none
  bool fnuz;               // finite, no infinities, the code of -0 is the only NaN
};

HETKV_HD constexpr FloatFormat format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {10, 15, 0x8000u, 0x7BFFu, 0x7E00u, 0x7C00u, false};
    case DType::kBFloat16:
      return {7, 127, 0x8000u, 0x7F7Fu, 0x7FC0u, 0x7F80u, false};
    case DType::kFloat8E4M3FN:
      return {3, 7, 0x80u, 0x7Eu, 0x7Fu, 0, false};
    case DType::kFloat8E4M3FNUZ:
      return {3, 8, 0x80u, 0x7Fu, 0x80u, 0, true};
    case DType::kFloat8E5M2:
      return {2, 15, 0x80u, 0x7Bu, 0x7Fu, 0x7Cu, false};
    case DType::kFloat8E5M2FNUZ:
      return {2, 16, 0x80u, 0x7Fu, 0x80u, 0, true};
    default:
      return {23, 127, 0x80000000u, 0x7F7FFFFFu, 0x7FC00000u, 0x7F800000u, false};
  }
}

// Without scales only floats convert; int8 and uint8 are moved, so both sides have the same dtype and no multipliers.
HETKV_HD constexpr bool is_float(DType dtype) {
  return dtype >= DType::kFloat32 && dtype <= DType::kFloat8E5M2FNUZ;
}

HETKV_HD inline float float_from_bits(std::uint32_t bits) {
  float value;
  HETKV_COPY_BITS(&value, &bits, 4);
  return value;
}

HETKV_HD inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  HETKV_COPY_BITS(&bits, &value, 4);
  return bits;
}

HETKV_HD inline float decode(FloatFormat format, std::uint32_t code) {
  const int shift = 23 - format.mantissa_bits;
  const std::uint32_t magnitude = code & (format.sign - 1);
  const bool infinite = format.infinity != 0 && magnitude == format.infinity;
  const bool nan = format.fnuz ? code == format.nan : magnitude > format.largest && !infinite;
  const std::uint32_t exponent = magnitude >> format.mantissa_bits;
  std::uint32_t bits;
  if (nan) return float_from_bits(0x7FC00000u);
  if (infinite) {
    bits = 0x7F800000u;
  } else if (exponent == 0 && format.bias < 127) {
    // Subnormal: magnitude * 2^(1 - bias - mantissa_bits), exact in float32.
    const float unit = float_from_bits(static_cast<std::uint32_t>(128 - format.bias - format.mantissa_bits) << 23);
    bits = bits_of(static_cast<float>(magnitude) * unit);
  } else {
    bits = (magnitude << shift) + (static_cast<std::uint32_t>(127 - format.bias) << 23);
  }
  return float_from_bits(bits | (code & format.sign ? 0x80000000u : 0u));
}

// Code of `value`; `*saturated` is set to whether it was clamped.
HETKV_HD inline std::uint32_t encode(FloatFormat format, float value, bool* saturated) {
  const std::uint32_t bits = bits_of(value);
  std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  *saturated = false;
  if (magnitude > 0x7F800000u) return format.nan;
  const int drop = 23 - format.mantissa_bits;
  const std::int32_t rebias = 127 - format.bias;
  std::uint32_t code;
  if (drop == 0) {
    code = magnitude;
  } else if (static_cast<std::int32_t>(magnitude >> 23) > rebias || rebias == 0) {
    magnitude -= static_cast<std::uint32_t>(rebias) << 23;
    code = (magnitude + (1u << (drop - 1)) - 1 + ((magnitude >> drop) & 1)) >> drop;
  } else {
    // Below the smallest normal: shift the mantissa to the subnormal's unit and round what falls out.
    const int down = drop + 1 + rebias - static_cast<int>(magnitude >> 23);
    const std::uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    code = down > 25 ? 0 : (mantissa + (1u << (down - 1)) - 1 + ((mantissa >> down) & 1)) >> down;
  }
  if (code > format.largest) {
    *saturated = true;
    code = format.largest;
  }
  const bool negative = (bits >> 31) != 0 && !(format.fnuz && code == 0);
  return code | (negative ? format.sign : 0u);
}

// Codes with scales (remap/remap.h): the floats above, and int8, whose codes are -127 to 127 times the scale (-128 is
// read, never written).
constexpr float kLargestInt8 = 127.0f;

HETKV_HD inline float decode_scaled(DType dtype, std::uint32_t code) {
  if (dtype == DType::kInt8) return static_cast<float>(static_cast<std::int8_t>(code));
  return decode(format_of(dtype), code);
}

// Rounds to nearest even. What int8 cannot hold saturates, and so does NaN, which becomes 0.
HETKV_HD inline std::uint32_t encode_scaled(DType dtype, float value, bool* saturated) {
  if (dtype != DType::kInt8) return encode(format_of(dtype), value, saturated);
  const bool nan = !(value == value);
  *saturated = nan || value >= 127.5f || value <= -127.5f;
  if (nan) return 0;
  const float bounded = value > kLargestInt8 ? kLargestInt8 : value < -kLargestInt8 ? -kLargestInt8 : value;
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(HETKV_RINT(bounded))) & 0xFFu;
}

// Largest finite magnitude of a dtype that takes scales.
HETKV_HD inline float largest_scaled(DType dtype) {
  return dtype == DType::kInt8 ? kLargestInt8 : decode(format_of(dtype), format_of(dtype).largest);
}

// Scale of a group whose largest magnitude is `amax`: that becomes the largest code. At least the smallest normal
// float32, so a group of zeros has a scale too; an infinite `amax` counts as the largest float32.
HETKV_HD inline float scale_of(float amax, float largest) {
  constexpr float kMax = 3.40282347e+38f, kMin = 1.17549435e-38f;
  const float scale = (amax < kMax ? amax : kMax) / largest;
  return scale > kMin ? scale : kMin;
}

// What takes a code times `multiplier` to a code times `scale`, which is above 0; bounded, so that a zero stays zero.
HETKV_HD inline float factor_of(float multiplier, float scale) {
  constexpr float kMax = 3.40282347e+38f;
  const float factor = multiplier / scale;
  return factor > kMax ? kMax : factor;
}

}  // namespace HETKV_ISA
}  // namespace hetkv
