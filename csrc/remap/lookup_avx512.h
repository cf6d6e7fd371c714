// Conversions of 8-bit codes by table (VBMI): a code has 256 values, so 64 of them convert in a few permutes, whatever
// the target and the multiplier. Included by kernels_avx512.cpp after kernels_simd.h, whose conversions fill the
// tables.
#pragma once

#include "remap/kernels_simd.h"

namespace hetkv::remap {
namespace {

// What each code becomes: its low bytes, its high bytes where the target has two, and 0xFF where it saturates.
struct alignas(64) Lookup {
  Bytes low[256];
  Bytes high[256];
  Bytes clamped[256];
  bool clamps;
  int from, to;  // DType codes, 0 before the first use
  std::uint32_t multiplier;
};

// Kept from call to call: a piece is many calls with one multiplier.
thread_local Lookup t_lookup;

template <DType kFrom, DType kTo>
void fill(Lookup& table, float multiplier) {
  alignas(64) Bytes codes[256];
  alignas(64) Bytes results[256 * item_size(kTo)];
  for (int i = 0; i < 256; ++i) codes[i] = static_cast<Bytes>(i);
  convert_rows<kFrom, kTo>(Rows{results, codes, 1, 0, 0, 0, 0}, 256, &multiplier, 0);
  table.clamps = false;
  for (int i = 0; i < 256; i += 16) {
    const F value = V::mul_float(decode<kFrom>(codes + i), V::set_float(multiplier));
    const I magnitude = V::bit_and(V::as_int(value), V::set(0x7FFFFFFF));
    const M special = V::greater(magnitude, V::set(last_fitting<kTo>()));
    const M nan = V::greater(magnitude, V::set(0x7F800000));
    const M clamped = static_cast<M>(special & ~nan);
    table.clamps = table.clamps || clamped != 0;
    _mm_store_si128(reinterpret_cast<__m128i*>(table.clamped + i), _mm_movm_epi8(clamped));
    if constexpr (item_size(kTo) == 1) {
      std::memcpy(table.low + i, results + i, 16);
    } else {
      const __m256i pair = _mm256_load_si256(reinterpret_cast<const __m256i*>(results + 2 * i));
      _mm_store_si128(reinterpret_cast<__m128i*>(table.low + i), _mm256_cvtepi16_epi8(pair));
      _mm_store_si128(reinterpret_cast<__m128i*>(table.high + i), _mm256_cvtepi16_epi8(_mm256_srli_epi16(pair, 8)));
    }
  }
}

struct Plane {
  __m512i part[4];
  explicit Plane(const Bytes* bytes) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_load_si512(bytes + 64 * i);
  }
  __m512i at(__m512i codes) const {
    const __m512i below = _mm512_permutex2var_epi8(part[0], codes, part[1]);
    const __m512i above = _mm512_permutex2var_epi8(part[2], codes, part[3]);
    return _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(codes), above);
  }
};

template <DType kFrom, DType kTo>
std::uint64_t lookup_rows(const Rows& rows, std::int64_t count, const float* multipliers, std::int64_t step) {
  constexpr int size = item_size(kTo);
  if (step != 0 || rows.count * count < 256) return convert_rows<kFrom, kTo>(rows, count, multipliers, step);
  const float multiplier = *multipliers;
  std::uint32_t key;
  std::memcpy(&key, &multiplier, 4);
  Lookup& table = t_lookup;
  if (table.from != static_cast<int>(kFrom) || table.to != static_cast<int>(kTo) || table.multiplier != key) {
    fill<kFrom, kTo>(table, multiplier);
    table.from = static_cast<int>(kFrom);
    table.to = static_cast<int>(kTo);
    table.multiplier = key;
  }
  const Plane low(table.low);
  const Plane high(size == 2 ? table.high : table.low);
  // 8-byte groups in the order that leaves whole halves after the low and high bytes are interleaved lane by lane.
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  std::uint64_t saturated = 0;
  for (std::int64_t r = 0; r < rows.count; ++r) {
    const Bytes* in = rows.src + r * rows.src_step;
    Bytes* out = rows.dst + r * rows.dst_step;
    for (std::int64_t left = count; left > 0; left -= 64, in += 64, out += 64 * size) {
      const __mmask64 present = left >= 64 ? ~0ull : first_bytes(left);
      __builtin_prefetch(in + rows.src_ahead);
      __builtin_prefetch(out + rows.dst_ahead, 1);
      __m512i codes = _mm512_maskz_loadu_epi8(present, in);
      if (table.clamps) {
        const __mmask64 clamped = _mm512_movepi8_mask(Plane(table.clamped).at(codes));
        saturated += static_cast<std::uint64_t>(__builtin_popcountll(clamped & present));
      }
      if constexpr (size == 1) {
        _mm512_mask_storeu_epi8(out, present, low.at(codes));
      } else {
        __builtin_prefetch(out + 64 + rows.dst_ahead, 1);
        codes = _mm512_permutexvar_epi64(order, codes);
        const __m512i lows = low.at(codes);
        const __m512i highs = high.at(codes);
        _mm512_mask_storeu_epi16(out, static_cast<__mmask32>(present), _mm512_unpacklo_epi8(lows, highs));
        _mm512_mask_storeu_epi16(out + 64, static_cast<__mmask32>(present >> 32), _mm512_unpackhi_epi8(lows, highs));
      }
    }
  }
  return saturated;
}

template <DType kFrom>
constexpr void look_up_row(Kernels& set) {
  auto& row = set.convert_rows[static_cast<int>(kFrom) - 1];
  row[1] = lookup_rows<kFrom, DType::kFloat16>;
  row[2] = lookup_rows<kFrom, DType::kBFloat16>;
  row[3] = lookup_rows<kFrom, DType::kFloat8E4M3FN>;
  row[4] = lookup_rows<kFrom, DType::kFloat8E4M3FNUZ>;
  row[5] = lookup_rows<kFrom, DType::kFloat8E5M2>;
  row[6] = lookup_rows<kFrom, DType::kFloat8E5M2FNUZ>;
}

constexpr Kernels with_lookups(Kernels set) {
  look_up_row<DType::kFloat8E4M3FN>(set);
  look_up_row<DType::kFloat8E4M3FNUZ>(set);
  look_up_row<DType::kFloat8E5M2>(set);
  look_up_row<DType::kFloat8E5M2FNUZ>(set);
  return set;
}

}  // namespace
}  // namespace hetkv::remap
