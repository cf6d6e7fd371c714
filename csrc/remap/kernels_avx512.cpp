// Kernels for AVX-512 F, BW, VL, DQ and VBMI. Built with wide flags: see kernels.h before including anything.
#if defined(__x86_64__)
#define HETKV_ISA avx512
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "remap/checksum.h"
#include "remap/kernels.h"

namespace hetkv::remap {
namespace {

struct V {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F load_f32(const Bytes* at) { return _mm512_loadu_ps(at); }
  static F load_half(const Bytes* at) { return _mm512_cvtph_ps(load256(at)); }
  static I load_u16(const Bytes* at) { return _mm512_cvtepu16_epi32(load256(at)); }
  static I load_u8(const Bytes* at) { return _mm512_cvtepu8_epi32(load128(at)); }
  static F load_i8(const Bytes* at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(at))); }
  static F load_e5m2(const Bytes* at) {
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(at)), 8));
  }
  static F load_e4m3_as_half(const Bytes* at) {
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load128(at)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xBFFF))));
  }
  static void store_u32(Bytes* at, I codes) { _mm512_storeu_si512(at, codes); }
  static void store_u16(Bytes* at, I codes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(codes));
  }
  static void store_u8(Bytes* at, I codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(codes));
  }
  static I half_codes(F value) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  static I round(F value) { return _mm512_cvtps_epi32(value); }  // to nearest even

  static F set_float(float value) { return _mm512_set1_ps(value); }
  static I set(std::int32_t value) { return _mm512_set1_epi32(value); }
  static F as_float(I bits) { return _mm512_castsi512_ps(bits); }
  static I as_int(F value) { return _mm512_castps_si512(value); }
  static F mul_float(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add_float(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub_float(F a, F b) { return _mm512_sub_ps(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  template <int kBits>
  static I shift_left(I a) {
    return _mm512_slli_epi32(a, kBits);
  }
  template <int kBits>
  static I shift_right(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static M equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static I select(M mask, I otherwise, I chosen) { return _mm512_mask_mov_epi32(otherwise, mask, chosen); }
  static bool any(M mask) { return mask != 0; }
  static int count(M mask) { return __builtin_popcount(mask); }

 private:
  static __m256i load256(const Bytes* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
  static __m128i load128(const Bytes* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
};

// Eight words of checksum_mix, added to `sum`; `key` is seed + (index + 1) * step for each word.
inline __m512i mix(__m512i sum, __m512i word, __m512i key) {
  const __m512i x = _mm512_xor_si512(word, key);
  const __m512i product = _mm512_mul_epu32(x, _mm512_srli_epi64(x, 32));
  return _mm512_add_epi64(sum, _mm512_add_epi64(product, word));
}

inline __m512i keys(std::uint64_t index, std::uint64_t seed) {
  const __m512i words =
      _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(index)), _mm512_set_epi64(8, 7, 6, 5, 4, 3, 2, 1));
  const __m512i steps = _mm512_mullo_epi64(words, _mm512_set1_epi64(static_cast<long long>(kChecksumStep)));
  return _mm512_add_epi64(steps, _mm512_set1_epi64(static_cast<long long>(seed)));
}

inline __m512i eight_steps() {
  return _mm512_set1_epi64(static_cast<long long>(8 * kChecksumStep));
}

inline std::uint64_t total_of(__m512i sum) {
  std::uint64_t lanes[8];
  _mm512_storeu_si512(lanes, sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

std::uint64_t checksum(const Bytes* data, std::int64_t bytes, std::uint64_t index, std::uint64_t seed) {
  __m512i sum = _mm512_setzero_si512();
  __m512i key = keys(index, seed);
  for (; bytes >= 64; bytes -= 64, data += 64, index += 8) {
    sum = mix(sum, _mm512_loadu_si512(data), key);
    key = _mm512_add_epi64(key, eight_steps());
  }
  std::uint64_t total = total_of(sum);
  for (; bytes > 0; bytes -= 8, data += 8, ++index) total += checksum_word(data, bytes < 8 ? bytes : 8, index, seed);
  return total;
}

inline __mmask64 first_bytes(std::int64_t bytes) {
  return ~0ull >> (64 - bytes);
}  // 1 to 64

void copy_rows(const Rows& rows, std::int64_t bytes) {
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    std::int64_t left = bytes;
    for (; left >= 64; left -= 64, in += 64, out += 64) {
      __builtin_prefetch(in + rows.src_ahead);
      __builtin_prefetch(out + rows.dst_ahead, 1);
      _mm512_storeu_si512(out, _mm512_loadu_si512(in));
    }
    if (left > 0) _mm512_mask_storeu_epi8(out, first_bytes(left), _mm512_maskz_loadu_epi8(first_bytes(left), in));
  }
}

std::uint64_t copy_rows_sum(const Rows& rows, std::int64_t bytes, std::uint64_t index, std::uint64_t index_step,
                            std::uint64_t seed) {
  __m512i sum = _mm512_setzero_si512();
  __m512i first_key = keys(index, seed);
  const __m512i row_step = _mm512_set1_epi64(static_cast<long long>(index_step * kChecksumStep));
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    __m512i key = first_key;
    std::int64_t left = bytes;
    for (; left >= 64; left -= 64, in += 64, out += 64) {
      __builtin_prefetch(in + rows.src_ahead);
      __builtin_prefetch(out + rows.dst_ahead, 1);
      const __m512i words = _mm512_loadu_si512(in);
      _mm512_storeu_si512(out, words);
      sum = mix(sum, words, key);
      key = _mm512_add_epi64(key, eight_steps());
    }
    if (left > 0) {
      const __m512i words = _mm512_maskz_loadu_epi8(first_bytes(left), in);
      _mm512_mask_storeu_epi8(out, first_bytes(left), words);
      const __mmask8 whole = static_cast<__mmask8>((1u << (left / 8)) - 1);
      sum = _mm512_mask_mov_epi64(sum, whole, mix(sum, words, key));
    }
    first_key = _mm512_add_epi64(first_key, row_step);
  }
  return total_of(sum);
}

}  // namespace
}  // namespace hetkv::remap

#include "remap/kernels_simd.h"
#include "remap/lookup_avx512.h"

namespace hetkv::remap {
const Kernels kAvx512Kernels = with_lookups(make_kernels("avx512"));
}  // namespace hetkv::remap
#endif
