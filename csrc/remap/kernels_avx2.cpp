// Kernels for AVX2 with F16C. Built with wide flags: see kernels.h before including anything.
#if defined(__x86_64__)
#define HETKV_ISA avx2
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "remap/checksum.h"
#include "remap/kernels.h"

namespace hetkv::remap {
namespace {

inline __m256i load256(const Bytes* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
inline void store256(Bytes* at, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
}

struct V {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;
  using M = __m256i;

  static F load_f32(const Bytes* at) { return _mm256_castsi256_ps(load256(at)); }
  static F load_half(const Bytes* at) { return _mm256_cvtph_ps(load128(at)); }
  static I load_u16(const Bytes* at) { return _mm256_cvtepu16_epi32(load128(at)); }
  static I load_u8(const Bytes* at) { return _mm256_cvtepu8_epi32(load64(at)); }
  static F load_i8(const Bytes* at) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(at))); }
  static F load_e5m2(const Bytes* at) { return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(load64(at)), 8)); }
  static F load_e4m3_as_half(const Bytes* at) {
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(load64(at)), 7);
    return _mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16(static_cast<short>(0xBFFF))));
  }
  static void store_u32(Bytes* at, I codes) { store256(at, codes); }
  static void store_u16(Bytes* at, I codes) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), narrow(codes)); }
  static void store_u8(Bytes* at, I codes) {
    const __m128i half = narrow(codes);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packus_epi16(half, half));
  }
  static I half_codes(F value) {
    return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static I round(F value) { return _mm256_cvtps_epi32(value); }  // to nearest even

  static F set_float(float value) { return _mm256_set1_ps(value); }
  static I set(std::int32_t value) { return _mm256_set1_epi32(value); }
  static F as_float(I bits) { return _mm256_castsi256_ps(bits); }
  static I as_int(F value) { return _mm256_castps_si256(value); }
  static F mul_float(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add_float(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub_float(F a, F b) { return _mm256_sub_ps(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  template <int kBits>
  static I shift_left(I a) {
    return _mm256_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I shift_right(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }
  static M equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  static I select(M mask, I otherwise, I chosen) { return _mm256_blendv_epi8(otherwise, chosen, mask); }
  static bool any(M mask) { return _mm256_movemask_epi8(mask) != 0; }
  static int count(M mask) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(as_float(mask)))); }

 private:
  static __m128i load128(const Bytes* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
  static __m128i load64(const Bytes* at) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)); }
  static __m128i narrow(I codes) {
    return _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  }
};

inline __m256i spread(std::uint64_t value) {
  return _mm256_set1_epi64x(static_cast<long long>(value));
}

// Four words of checksum_mix, added to `sum`; `key` is seed + (index + 1) * step for each word.
inline __m256i mix(__m256i sum, __m256i word, __m256i key) {
  const __m256i x = _mm256_xor_si256(word, key);
  const __m256i product = _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32));
  return _mm256_add_epi64(sum, _mm256_add_epi64(product, word));
}

inline __m256i keys(std::uint64_t index, std::uint64_t seed) {
  const __m256i steps =
      _mm256_set_epi64x(static_cast<long long>(4 * kChecksumStep), static_cast<long long>(3 * kChecksumStep),
                        static_cast<long long>(2 * kChecksumStep), static_cast<long long>(kChecksumStep));
  return _mm256_add_epi64(steps, spread(seed + index * kChecksumStep));
}

inline std::uint64_t total_of(__m256i sum) {
  std::uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

std::uint64_t checksum(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed) {
  __m256i even = _mm256_setzero_si256();
  __m256i odd = _mm256_setzero_si256();
  __m256i key = keys(index, seed);
  for (; bytes >= 64; bytes -= 64, data += 64, index += 8) {
    even = mix(even, load256(data), key);
    odd = mix(odd, load256(data + 32), _mm256_add_epi64(key, spread(4 * kChecksumStep)));
    key = _mm256_add_epi64(key, spread(8 * kChecksumStep));
  }
  std::uint64_t total = total_of(_mm256_add_epi64(even, odd));
  for (; bytes > 0; bytes -= 8, data += 8, ++index) total += checksum_word(data, bytes < 8 ? bytes : 8, index, seed);
  return total;
}

void copy_rows(const Rows& rows, std::int64_t bytes) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    if (bytes < 32) {
      std::memcpy(out, in, static_cast<std::size_t>(bytes));
      continue;
    }
    std::int64_t at = 0;
    for (; at + 64 <= bytes; at += 64) {
      __builtin_prefetch(in + at + rows.src_ahead);
      __builtin_prefetch(out + at + rows.dst_ahead, 1);
      store256(out + at, load256(in + at));
      store256(out + at + 32, load256(in + at + 32));
    }
    if (at + 32 <= bytes) store256(out + at, load256(in + at));
    if (at < bytes) store256(out + bytes - 32, load256(in + bytes - 32));  // overlaps what is already there
  }
}

std::uint64_t copy_rows_sum(const Rows& rows, std::int64_t bytes, std::uint64_t index, std::uint64_t index_step,
                            std::uint64_t seed) {
  __m256i even = _mm256_setzero_si256();
  __m256i odd = _mm256_setzero_si256();
  std::uint64_t tails = 0;
  for (std::int64_t r = 0; r < rows.count; ++r, index += index_step) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    __m256i key = keys(index, seed);
    std::int64_t at = 0;
    for (; at + 64 <= bytes; at += 64) {
      __builtin_prefetch(in + at + rows.src_ahead);
      __builtin_prefetch(out + at + rows.dst_ahead, 1);
      const __m256i low = load256(in + at);
      const __m256i high = load256(in + at + 32);
      store256(out + at, low);
      store256(out + at + 32, high);
      even = mix(even, low, key);
      odd = mix(odd, high, _mm256_add_epi64(key, spread(4 * kChecksumStep)));
      key = _mm256_add_epi64(key, spread(8 * kChecksumStep));
    }
    for (; at < bytes; at += 8) {
      std::memcpy(out + at, in + at, 8);
      tails += checksum_word(in + at, 8, index + static_cast<std::uint64_t>(at / 8), seed);
    }
  }
  return total_of(_mm256_add_epi64(even, odd)) + tails;
}

}  // namespace
}  // namespace hetkv::remap

#include "remap/kernels_simd.h"

namespace hetkv::remap {
const Kernels kAvx2Kernels = make_kernels("avx2");
}  // namespace hetkv::remap
#endif
