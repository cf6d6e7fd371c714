// Division by a number that is known before the kernel starts: one multiplication and one shift.
#pragma once

#include <cstdint>

#include "backend/gpu/inline.h"

namespace hetkv::gpu {

// For dividends below 2^31. With s = ceil(log2 d) and m = floor(2^(31+s) / d) + 1, n * m >> (31 + s) is n / d, because
// m * d - 2^(31+s) is at most 2^s (Granlund and Montgomery, 1994).
struct FastDiv {
  std::uint32_t divisor = 1;
  std::uint32_t magic = 0x80000001u;
  std::uint32_t shift = 31;

  FastDiv() = default;
  explicit FastDiv(std::uint32_t d) : divisor(d) {
    const std::uint32_t s = d <= 1 ? 0 : 32 - static_cast<std::uint32_t>(__builtin_clz(d - 1));  // ceil(log2 d)
    shift = 31 + s;
    magic = static_cast<std::uint32_t>((std::uint64_t{1} << shift) / d + 1);
  }

  HETKV_INLINE std::uint32_t divide(std::uint32_t n) const {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(n) * magic) >> shift);
  }
  // Leaves the quotient in `n` and returns the remainder.
  HETKV_INLINE std::uint32_t split(std::uint32_t& n) const {
    const std::uint32_t quotient = divide(n);
    const std::uint32_t remainder = n - quotient * divisor;
    n = quotient;
    return remainder;
  }
};

}  // namespace hetkv::gpu
