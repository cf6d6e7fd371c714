// Loads and stores of whole vectors, and the elements inside them.
#pragma once

#include <cstdint>
#include <cstring>

#include "backend/gpu/inline.h"

namespace hetkv::gpu {

// `kWords` times 4 bytes. Up to 8 elements of any dtype.
template <int kWords>
struct alignas(kWords >= 4 ? 16 : kWords * 4) Vector {
  std::uint32_t w[kWords];
};

template <int kWords>
HETKV_INLINE Vector<kWords> load(std::uint64_t address) {
  return *reinterpret_cast<const Vector<kWords>*>(static_cast<std::uintptr_t>(address));
}

// For loads that touch only pieces of 32 bytes each: the second-level cache fetches whole lines of 128 bytes, of which
// the loads that follow need the rest.
template <int kWords>
HETKV_INLINE Vector<kWords> load_with_line(std::uint64_t address) {
#if defined(__CUDA_ARCH__)
  Vector<kWords> v;
  if constexpr (kWords == 2) {
    asm volatile("ld.global.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(address));
  } else {
    HETKV_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("ld.global.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.w[i]), "=r"(v.w[i + 1]), "=r"(v.w[i + 2]), "=r"(v.w[i + 3])
                   : "l"(address + 4 * i));
    }
  }
  return v;
#else
  return load<kWords>(address);
#endif
}

template <int kWords>
HETKV_INLINE void store(std::uint64_t address, const Vector<kWords>& v) {
  *reinterpret_cast<Vector<kWords>*>(static_cast<std::uintptr_t>(address)) = v;
}

// One element of `size` bytes (1, 2 or 4), in the low bits.
HETKV_INLINE std::uint32_t load_element(std::uint64_t address, int size) {
  const void* at = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
  if (size == 1) return *static_cast<const std::uint8_t*>(at);
  if (size == 2) return *static_cast<const std::uint16_t*>(at);
  return *static_cast<const std::uint32_t*>(at);
}

HETKV_INLINE void store_element(std::uint64_t address, int size, std::uint32_t code) {
  void* at = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
  if (size == 1) {
    *static_cast<std::uint8_t*>(at) = static_cast<std::uint8_t>(code);
  } else if (size == 2) {
    *static_cast<std::uint16_t*>(at) = static_cast<std::uint16_t>(code);
  } else {
    *static_cast<std::uint32_t*>(at) = code;
  }
}

// Element i of a vector of elements of kSize bytes. `i` is a constant once the caller's loop is unrolled.
template <int kSize, int kWords>
HETKV_INLINE std::uint32_t element(const Vector<kWords>& v, int i) {
  if constexpr (kSize == 4) return v.w[i];
  if constexpr (kSize == 2) return (v.w[i / 2] >> (i % 2 * 16)) & 0xFFFFu;
  return (v.w[i / 4] >> (i % 4 * 8)) & 0xFFu;
}

// Sets element i of a vector whose bits there are still zero.
template <int kSize, int kWords>
HETKV_INLINE void add_element(Vector<kWords>& v, int i, std::uint32_t code) {
  if constexpr (kSize == 4) v.w[i] = code;
  if constexpr (kSize == 2) v.w[i / 2] |= code << (i % 2 * 16);
  if constexpr (kSize == 1) v.w[i / 4] |= code << (i % 4 * 8);
}

}  // namespace hetkv::gpu
