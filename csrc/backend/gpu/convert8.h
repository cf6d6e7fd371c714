// Conversion of 8 elements in registers. The fast way is right for every finite value that stays within the target's
// range, and knows when it meets another; those vectors, which are rare, are left to convert_one.
#pragma once

#include "backend/gpu/memory.h"
#include "backend/gpu/plan.h"
#include "convert.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define HETKV_FP8_HARDWARE 1
#else
#define HETKV_FP8_HARDWARE 0
#endif

namespace hetkv::gpu {

template <DType kType>
constexpr int kGroupWords = kGroup * item_size(kType) / 4;

template <DType kType>
struct TypeOf {
  static constexpr DType value = kType;
};

// Eight elements of `kType`.
template <DType kType>
using Elements = Vector<kGroupWords<kType>>;

// The largest float32 that rounds to a finite value of the format; a tie goes to the even code, which only in e4m3fn is
// the largest one.
template <DType kType>
HETKV_HD constexpr float last_fitting() {
  switch (kType) {
    case DType::kFloat16:
      return 0x1.FFDFFEp15f;
    case DType::kBFloat16:
      return 0x1.FEFFFEp127f;
    case DType::kFloat8E4M3FN:
      return 464.0f;
    case DType::kFloat8E4M3FNUZ:
      return 0x1.EFFFFEp7f;
    case DType::kFloat8E5M2:
      return 0x1.DFFFFEp15f;
    case DType::kFloat8E5M2FNUZ:
      return 0x1.DFFFFEp15f;
    default:
      return 0x1.FFFFFEp127f;
  }
}

HETKV_HD constexpr bool is_fnuz(DType type) {
  return type == DType::kFloat8E4M3FNUZ || type == DType::kFloat8E5M2FNUZ;
}

// Some byte of `word` is zero.
HETKV_INLINE bool has_zero_byte(std::uint32_t word) {
  return ((word - 0x01010101u) & ~word & 0x80808080u) != 0;
}

HETKV_INLINE float half_to_float(std::uint32_t code) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(code));
  return value;
#elif defined(__HIP_DEVICE_COMPILE__)
  _Float16 half;
  const std::uint16_t bits = static_cast<std::uint16_t>(code);
  __builtin_memcpy(&half, &bits, 2);
  return static_cast<float>(half);
#else
  return decode(format_of(DType::kFloat16), code);
#endif
}

// Two bytes of fp8 to two halves, the low one in the low half. Every e5m2 is the upper byte of a half. An e4m3 shifted
// into a half's place is 2^-8 of its value, and its NaN is then finite: `*special` says so.
template <DType kType>
HETKV_INLINE std::uint32_t fp8_pair_to_halves(std::uint32_t pair, float* scale, bool* special) {
  *scale = is_fnuz(kType) ? 0.5f : 1.0f;
  if constexpr (kType == DType::kFloat8E5M2 || kType == DType::kFloat8E5M2FNUZ) {
    return (pair & 0xFFu) << 8 | (pair & 0xFF00u) << 16;
  }
#if HETKV_FP8_HARDWARE
  std::uint32_t halves;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(halves) : "r"(pair));
  return halves;
#else
  *scale *= 256.0f;
  *special |= kType == DType::kFloat8E4M3FN && ((pair & 0x7Fu) == 0x7Fu || (pair & 0x7F00u) == 0x7F00u);
  const std::uint32_t spread = (pair & 0xFFu) | (pair & 0xFF00u) << 8;
  return (spread & 0x00800080u) << 8 | (spread & 0x007F007Fu) << 7;
#endif
}

// Exact values of 8 elements. Those that the fast way does not read right set `*special`, or come out as infinity or
// NaN.
template <DType kType>
HETKV_INLINE void decode8(const Elements<kType>& codes, float (&values)[kGroup], bool* special) {
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) {
    if constexpr (kType == DType::kFloat32) values[i] = float_from_bits(codes.w[i]);
    if constexpr (kType == DType::kFloat16) values[i] = half_to_float(element<2>(codes, i));
    if constexpr (kType == DType::kBFloat16) {
      values[i] = float_from_bits(i % 2 == 0 ? codes.w[i / 2] << 16 : codes.w[i / 2] & 0xFFFF0000u);
    }
  }
  if constexpr (item_size(kType) == 1) {
    if constexpr (is_fnuz(kType)) {
      *special |= has_zero_byte(codes.w[0] ^ 0x80808080u) || has_zero_byte(codes.w[1] ^ 0x80808080u);
    }
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); i += 2) {
      float scale;
      const std::uint32_t pair = (codes.w[i / 4] >> (i % 4 * 8)) & 0xFFFFu;
      const std::uint32_t halves = fp8_pair_to_halves<kType>(pair, &scale, special);
      values[i] = half_to_float(halves & 0xFFFFu) * scale;
      values[i + 1] = half_to_float(halves >> 16) * scale;
    }
  }
}

// Two finite values to two codes of 16 bits.
template <DType kType>
HETKV_INLINE std::uint32_t encode_pair16(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t pair;
  if constexpr (kType == DType::kFloat16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  if constexpr (kType == DType::kBFloat16) {
    const auto round = [](std::uint32_t bits) { return bits + 0x7FFFu + (bits >> 16 & 1); };
    return round(bits_of(low)) >> 16 | (round(bits_of(high)) & 0xFFFF0000u);
  }
#if defined(__HIP_DEVICE_COMPILE__)
  const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  std::uint32_t pair;
  __builtin_memcpy(&pair, halves, 4);
  return pair;
#else
  bool saturated;
  return encode(format_of(kType), low, &saturated) | encode(format_of(kType), high, &saturated) << 16;
#endif
#endif
}

// One finite value to fp8. A subnormal is rounded by adding the power of two whose last place is the subnormals' unit.
template <DType kType>
HETKV_INLINE std::uint32_t encode_fp8(float value) {
  constexpr FloatFormat format = format_of(kType);
  constexpr int drop = 23 - format.mantissa_bits;
  constexpr std::uint32_t rebias = static_cast<std::uint32_t>(127 - format.bias) << 23;
  constexpr std::uint32_t magic = static_cast<std::uint32_t>(127 + 1 - format.bias - format.mantissa_bits + 23) << 23;
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  const std::uint32_t normal = (magnitude - rebias + (1u << (drop - 1)) - 1 + (magnitude >> drop & 1)) >> drop;
  const std::uint32_t subnormal = bits_of(float_from_bits(magnitude) + float_from_bits(magic)) - magic;
  const std::uint32_t code = magnitude > rebias + 0x7FFFFFu ? normal : subnormal;
  return code | (bits >> 24 & 0x80u);
}

// Four finite values to four codes of 8 bits.
template <DType kType>
HETKV_INLINE std::uint32_t encode_quad8(const float* values) {
  std::uint32_t word;
#if HETKV_FP8_HARDWARE
  // An fnuz code is the OCP code of twice the value.
  constexpr float scale = is_fnuz(kType) ? 2.0f : 1.0f;
  std::uint16_t low, high;
  if constexpr (kType == DType::kFloat8E4M3FN || kType == DType::kFloat8E4M3FNUZ) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1] * scale), "f"(values[0] * scale));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3] * scale), "f"(values[2] * scale));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(low) : "f"(values[1] * scale), "f"(values[0] * scale));
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(high) : "f"(values[3] * scale), "f"(values[2] * scale));
  }
  word = low | static_cast<std::uint32_t>(high) << 16;
#else
  word = encode_fp8<kType>(values[0]) | encode_fp8<kType>(values[1]) << 8 | encode_fp8<kType>(values[2]) << 16 |
         encode_fp8<kType>(values[3]) << 24;
#endif
  if constexpr (is_fnuz(kType)) {
    // There is no negative zero: keep a sign only where the magnitude is not zero.
    const std::uint32_t magnitude = word & 0x7F7F7F7Fu;
    word = magnitude | (word & (magnitude + 0x7F7F7F7Fu) & 0x80808080u);
  }
  return word;
}

// Codes of 8 values. Sets `*special` where one of them is not finite or would be clamped.
template <DType kType>
HETKV_INLINE Elements<kType> encode8(const float (&values)[kGroup], bool* special) {
  // Above this the doubled value leaves the range in which the OCP codes are the fnuz ones.
  constexpr float limit = !(HETKV_FP8_HARDWARE && is_fnuz(kType)) ? last_fitting<kType>()
                          : kType == DType::kFloat8E4M3FNUZ       ? 232.0f
                                                                  : 0x1.DFFFFEp14f;
  Elements<kType> codes;
  bool outside = false;
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) {
    const float magnitude = float_from_bits(bits_of(values[i]) & 0x7FFFFFFFu);
    outside |= !(magnitude <= limit);
    if constexpr (kType == DType::kFloat32) codes.w[i] = bits_of(values[i]);
    if constexpr (item_size(kType) == 2) {
      if (i % 2 == 0) codes.w[i / 2] = encode_pair16<kType>(values[i], values[i + 1]);
    }
    if constexpr (item_size(kType) == 1) {
      if (i % 4 == 0) codes.w[i / 4] = encode_quad8<kType>(values + i);
    }
  }
  *special |= outside;
  return codes;
}

// Calls body(TypeOf<type>) for the float dtype `type`, one of kSize bytes.
template <int kSize, typename Body>
HETKV_INLINE void with_float(DType type, const Body& body) {
  if constexpr (kSize == 4) {
    body(TypeOf<DType::kFloat32>{});
  } else if constexpr (kSize == 2) {
    type == DType::kFloat16 ? body(TypeOf<DType::kFloat16>{}) : body(TypeOf<DType::kBFloat16>{});
  } else {
    if (type == DType::kFloat8E4M3FN) return body(TypeOf<DType::kFloat8E4M3FN>{});
    if (type == DType::kFloat8E4M3FNUZ) return body(TypeOf<DType::kFloat8E4M3FNUZ>{});
    if (type == DType::kFloat8E5M2) return body(TypeOf<DType::kFloat8E5M2>{});
    body(TypeOf<DType::kFloat8E5M2FNUZ>{});
  }
}

// Calls body(SizeOf<bytes>) for an element of `bytes` bytes.
template <int kBytes>
struct SizeOf {
  static constexpr int value = kBytes;
};

template <typename Body>
HETKV_INLINE void with_size(int bytes, const Body& body) {
  if (bytes == 1) return body(SizeOf<1>{});
  if (bytes == 2) return body(SizeOf<2>{});
  return body(SizeOf<4>{});
}

// `*result` = convert(codes * multiplier), 8 elements of kFrom bytes to kTo bytes. False where the fast way cannot.
template <int kFrom, int kTo>
HETKV_INLINE bool convert8(DType from, DType to, const Vector<2 * kFrom>& codes, float multiplier,
                           Vector<2 * kTo>* result) {
  float values[kGroup];
  bool special = false;
  with_float<kFrom>(from, [&](auto type) { decode8<decltype(type)::value>(codes, values, &special); });
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) values[i] *= multiplier;
  with_float<kTo>(to, [&](auto type) { *result = encode8<decltype(type)::value>(values, &special); });
  return !special;
}

// The definition, for one element: the code, and 1 << 32 where it was clamped.
HETKV_CALL std::uint64_t convert_one(DType from, DType to, std::uint32_t code, float multiplier) {
  bool clamped;
  const std::uint32_t result = encode(format_of(to), decode(format_of(from), code) * multiplier, &clamped);
  return result | static_cast<std::uint64_t>(clamped) << 32;
}

}  // namespace hetkv::gpu
