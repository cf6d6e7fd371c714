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

// Two halves to two values.
HETKV_INLINE void halves_to_floats(std::uint32_t halves, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(halves));
#elif defined(__HIP_DEVICE_COMPILE__)
  _Float16 pair[2];
  __builtin_memcpy(pair, &halves, 4);
  low = static_cast<float>(pair[0]);
  high = static_cast<float>(pair[1]);
#else
  low = decode(format_of(DType::kFloat16), halves & 0xFFFFu);
  high = decode(format_of(DType::kFloat16), halves >> 16);
#endif
}

// Four codes of fp8 to two words of halves that hold `*scale` times less. Every e5m2 is the upper byte of a half. An
// e4m3 shifted into a half's place is 2^-8 of its value, and its NaN is then finite: `*special` says so.
template <DType kType>
HETKV_INLINE void fp8_to_halves(std::uint32_t codes, std::uint32_t (&halves)[2], float* scale, bool* special) {
  *scale = is_fnuz(kType) ? 0.5f : 1.0f;
  if constexpr (kType == DType::kFloat8E5M2 || kType == DType::kFloat8E5M2FNUZ) {
    halves[0] = (codes & 0xFFu) << 8 | (codes & 0xFF00u) << 16;
    halves[1] = (codes & 0xFF0000u) >> 8 | (codes & 0xFF000000u);
  } else {
#if HETKV_FP8_HARDWARE
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
        : "=r"(halves[0]), "=r"(halves[1])
        : "r"(codes));
#else
    *scale *= 256.0f;
    *special |= kType == DType::kFloat8E4M3FN && has_zero_byte(~codes & 0x7F7F7F7Fu);
    const std::uint32_t low = (codes & 0xFFu) | (codes & 0xFF00u) << 8;
    const std::uint32_t high = (codes & 0xFF0000u) >> 16 | (codes & 0xFF000000u) >> 8;
    halves[0] = (low & 0x00800080u) << 8 | (low & 0x007F007Fu) << 7;
    halves[1] = (high & 0x00800080u) << 8 | (high & 0x007F007Fu) << 7;
#endif
  }
}

// Exact values of 8 elements. Those that the fast way does not read right set `*special`, or come out as infinity or
// NaN.
template <DType kType>
HETKV_INLINE void decode8(const Elements<kType>& codes, float (&values)[kGroup], bool* special) {
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); i += 2) {
    if constexpr (kType == DType::kFloat32) {
      values[i] = float_from_bits(codes.w[i]);
      values[i + 1] = float_from_bits(codes.w[i + 1]);
    }
    if constexpr (kType == DType::kFloat16) halves_to_floats(codes.w[i / 2], values[i], values[i + 1]);
    if constexpr (kType == DType::kBFloat16) {
      values[i] = float_from_bits(codes.w[i / 2] << 16);
      values[i + 1] = float_from_bits(codes.w[i / 2] & 0xFFFF0000u);
    }
  }
  if constexpr (item_size(kType) == 1) {
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); i += 4) {
      if constexpr (is_fnuz(kType)) *special |= has_zero_byte(codes.w[i / 4] ^ 0x80808080u);
      float scale;
      std::uint32_t halves[2];
      fp8_to_halves<kType>(codes.w[i / 4], halves, &scale, special);
      halves_to_floats(halves[0], values[i], values[i + 1]);
      halves_to_floats(halves[1], values[i + 2], values[i + 3]);
      HETKV_UNROLL
      for (int j = i; j < i + 4; ++j) values[j] *= scale;
    }
  }
}

// Two values to two codes of 16 bits; what is not finite or too large becomes infinity or a NaN.
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
    const auto round = [](std::uint32_t bits) {
      return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits | 0x7FC00000u : bits + 0x7FFFu + (bits >> 16 & 1);
    };
    return round(bits_of(low)) >> 16 | (round(bits_of(high)) & 0xFFFF0000u);
  }
#if defined(__HIP_DEVICE_COMPILE__)
  const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  std::uint32_t pair;
  __builtin_memcpy(&pair, halves, 4);
  return pair;
#else
  const auto code = [](float value) {
    bool clamped;
    const std::uint32_t result = encode(format_of(kType), value, &clamped);
    return clamped ? result + 1 : result;  // infinity, as the hardware has it
  };
  return code(low) | code(high) << 16;
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
  return word;
}

// What to add to each code's magnitude so that its top bit tells of what is not finite or was clamped: the least such
// code, or in hardware's clamping formats the largest finite one, to the power of two above.
template <DType kType>
HETKV_HD constexpr std::uint32_t overflow_bias() {
  switch (kType) {
    case DType::kFloat32:
      return 0x00800000u;
    case DType::kFloat16:
      return 0x04000400u;
    case DType::kBFloat16:
      return 0x00800080u;
    case DType::kFloat8E4M3FN:
    case DType::kFloat8E4M3FNUZ:
      return 0x02020202u;
    default:
      return 0x05050505u;
  }
}

// Codes of 8 values. Sets `*special` where one of them is not finite or may have been clamped.
template <DType kType>
HETKV_INLINE Elements<kType> encode8(const float (&values)[kGroup], bool* special) {
  constexpr bool by_codes = item_size(kType) > 1 || HETKV_FP8_HARDWARE;
  constexpr int per_word = 4 / item_size(kType);
  constexpr std::uint32_t signs = per_word == 4 ? 0x80808080u : per_word == 2 ? 0x80008000u : 0x80000000u;
  Elements<kType> codes;
  std::uint32_t overflow = 0;
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); i += per_word) {
    std::uint32_t& word = codes.w[i / per_word];
    if constexpr (per_word == 1) word = bits_of(values[i]);
    if constexpr (per_word == 2) word = encode_pair16<kType>(values[i], values[i + 1]);
    if constexpr (per_word == 4) word = encode_quad8<kType>(values + i);
    overflow |= (word & ~signs) + overflow_bias<kType>();
    if constexpr (is_fnuz(kType)) {
      // There is no negative zero: keep a sign only where the magnitude is not zero.
      const std::uint32_t magnitude = word & ~signs;
      word = magnitude | (word & (magnitude + 0x7F7F7F7Fu) & signs);
    }
  }
  if constexpr (by_codes) {
    *special |= (overflow & signs) != 0;
  } else {
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); ++i) {
      *special |= !(float_from_bits(bits_of(values[i]) & 0x7FFFFFFFu) <= last_fitting<kType>());
    }
  }
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

// Calls body(TypeOf<type>) for any float dtype.
template <typename Body>
HETKV_INLINE void with_dtype(DType type, const Body& body) {
  if (item_size(type) == 1) return with_float<1>(type, body);
  if (item_size(type) == 2) return with_float<2>(type, body);
  with_float<4>(type, body);
}

// Calls body(SizeOf<bytes>) for an element of `bytes` bytes.
template <int kBytes>
struct SizeOf {
  static constexpr int value = kBytes;
};

template <typename Body>
HETKV_INLINE void with_size(int bytes, const Body& body) {
  if (bytes == 1) return body(SizeOf<1>{});
  if (bytes == 4) return body(SizeOf<4>{});
  body(SizeOf<2>{});
}

// `*result` = convert(codes * multiplier). False where the fast way cannot.
template <DType kFrom, DType kTo>
HETKV_INLINE bool convert8(const Elements<kFrom>& codes, float multiplier, Elements<kTo>* result) {
  float values[kGroup];
  bool special = false;
  decode8<kFrom>(codes, values, &special);
  if (multiplier != 1.0f) {
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); ++i) values[i] *= multiplier;
  }
  *result = encode8<kTo>(values, &special);
  return !special;
}

// The same for codes of kFrom bytes to codes of kTo bytes, their dtypes known when it runs.
template <int kFrom, int kTo>
HETKV_INLINE bool convert8(DType from, DType to, const Vector<2 * kFrom>& codes, float multiplier,
                           Vector<2 * kTo>* result) {
  float values[kGroup];
  bool special = false;
  with_float<kFrom>(from, [&](auto type) { decode8<decltype(type)::value>(codes, values, &special); });
  if (multiplier != 1.0f) {
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); ++i) values[i] *= multiplier;
  }
  with_float<kTo>(to, [&](auto type) { *result = encode8<decltype(type)::value>(values, &special); });
  return !special;
}

// The definition, for one element: the code, and 1 << 32 where it was clamped.
HETKV_CALL std::uint64_t convert_one(DType from, DType to, std::uint32_t code, float multiplier) {
  bool clamped;
  const std::uint32_t result = encode(format_of(to), decode(format_of(from), code) * multiplier, &clamped);
  return result | static_cast<std::uint64_t>(clamped) << 32;
}

// The same for codes that have scales, which int8 is one of.
HETKV_CALL std::uint64_t convert_scaled(DType from, DType to, std::uint32_t code, float multiplier) {
  bool clamped;
  const std::uint32_t result = encode_scaled(to, decode_scaled(from, code) * multiplier, &clamped);
  return result | static_cast<std::uint64_t>(clamped) << 32;
}

}  // namespace hetkv::gpu
