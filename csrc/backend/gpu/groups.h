// Values to codes with a scale for each group of channels, and back. Groups are counted in the wire's order, in which
// their codes and their scales are contiguous. A cluster of neighbouring lanes, one for each 8 channels, takes kDepth
// groups that follow each other, so that its leader has whole words of scales. A thread is made, which loads; `shared`
// becomes the largest of the cluster's; then it stores.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"

namespace hetkv::gpu {

struct GroupItem {
  std::uint32_t first;    // group
  std::uint32_t channel;  // of the group, the first of 8
  std::uint32_t left;     // groups of the job from `first` on
  bool idle;              // the group has fewer channels

  HETKV_INLINE bool has(std::uint32_t k) const { return k < left && !idle; }
  HETKV_INLINE bool leads() const { return channel == 0; }
};

// Any item, also one beyond the job's last, as the lanes of a warp stay together.
HETKV_INLINE GroupItem group_item(const Job& job, std::uint32_t item) {
  GroupItem at;
  at.channel = (item & ((1u << job.log_cluster) - 1)) * kGroup;
  at.first = (item >> job.log_cluster) * kDepth;
  at.left = at.first < job.groups ? job.groups - at.first : 0;
  at.idle = at.channel >= job.group_channels;
  return at;
}

HETKV_INLINE std::uint32_t head_of(const Job& job, std::uint32_t group) {
  return job.token_count.divide(job.row_groups.divide(group));
}

HETKV_INLINE std::uint64_t codes_at(const Job& job, const Side& side, const GroupItem& at, std::uint32_t k) {
  return side.base + static_cast<std::uint64_t>(at.first + k) * job.group_channels + at.channel;
}

// 8 channels that are not contiguous, from the first one's.
template <int kSize>
HETKV_CALL Vector<2 * kSize> gather8(const Side& side, std::uint64_t row, std::uint32_t channel) {
  Vector<2 * kSize> v{};
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) {
    add_element<kSize>(v, static_cast<int>(i), load_element(row + channel_offset(side, channel + i), kSize));
  }
  return v;
}
template <int kSize>
HETKV_CALL void scatter8(const Side& side, std::uint64_t row, std::uint32_t channel, Vector<2 * kSize> v) {
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) {
    store_element(row + channel_offset(side, channel + i), kSize, element<kSize>(v, static_cast<int>(i)));
  }
}

// Where the 8 channels of an item's groups are on the side of the values. All block ids are asked for before one is
// waited for.
class GroupRows {
 public:
  HETKV_INLINE GroupRows(const Job& job, const Side& side, const GroupItem& at) : side_(side) {
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      in_block_[k] = id_[k] = head_[k] = channel_[k] = 0;
      if (!at.has(k)) continue;
      std::uint32_t row = at.first + k;
      channel_[k] = job.row_groups.split(row) * job.group_channels + at.channel;
      in_block_[k] = job.token_count.split(row);
      head_[k] = row;
      if (side.blocks == nullptr) continue;
      std::uint32_t block = side.first_token + in_block_[k];
      in_block_[k] = side.block_size.split(block);
      id_[k] = static_cast<std::uint32_t>(side.blocks[block]);
    }
  }
  HETKV_INLINE std::uint64_t operator[](std::uint32_t k) const { return row(k) + channel_offset(side_, channel_[k]); }
  template <int kSize>
  HETKV_INLINE Vector<2 * kSize> load(bool runs, std::uint32_t k) const {
    return runs ? gpu::load<2 * kSize>((*this)[k]) : gather8<kSize>(side_, row(k), channel_[k]);
  }
  template <int kSize>
  HETKV_INLINE void store(bool runs, std::uint32_t k, const Vector<2 * kSize>& v) const {
    runs ? gpu::store<2 * kSize>((*this)[k], v) : scatter8<kSize>(side_, row(k), channel_[k], v);
  }

 private:
  HETKV_INLINE std::uint64_t row(std::uint32_t k) const {
    return side_.base + times(head_[k], side_.head_stride) + times(id_[k], side_.block_stride) +
           times(in_block_[k], side_.token_stride);
  }
  const Side& side_;
  std::uint32_t in_block_[kDepth];
  std::uint32_t id_[kDepth];
  std::uint32_t head_[kDepth];
  std::uint32_t channel_[kDepth];
};

HETKV_INLINE float magnitude(float value) {
  return float_from_bits(bits_of(value) & 0x7FFFFFFFu);
}

// The definition for 8 elements, of which some are no numbers or are clamped.
template <DType kTo>
struct Converted {
  Elements<kTo> codes{};
  std::uint32_t saturated = 0;
};
template <DType kFrom, DType kTo>
HETKV_CALL Converted<kTo> convert_slowly(Elements<kFrom> from, float multiplier) {
  Converted<kTo> to;
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) {
    const std::uint64_t found = convert_scaled(kFrom, kTo, element<item_size(kFrom)>(from, i), multiplier);
    add_element<item_size(kTo)>(to.codes, i, static_cast<std::uint32_t>(found));
    to.saturated += static_cast<std::uint32_t>(found >> 32);
  }
  return to;
}

// Checksum and, where it `stores`, store of a cluster's scales; `scales` beyond `left` are zero, as is the padding.
HETKV_INLINE std::uint64_t scale_words(const Job& job, const std::uint32_t (&scales)[kDepth], std::uint32_t left,
                                       std::uint64_t address, bool stores) {
  std::uint64_t total = 0;
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < kDepth; k += 2) {
    if (k >= left) continue;
    const Vector<2> word{{scales[k], scales[k + 1]}};
    if (stores) store<2>(address + 4 * k, word);
    total += sum(word, job.seed + ((address + 4 * k) / 8 + job.scale_origin) * remap::kChecksumStep);
  }
  return total;
}

// Codes of the largest magnitude among 8 elements, NaN among them above infinity's.
template <DType kType>
HETKV_INLINE std::uint32_t largest_code(const Elements<kType>& v) {
  std::uint32_t most = 0;
  const auto take = [&](std::uint32_t code) { most = code > most ? code : most; };
  HETKV_UNROLL
  for (int i = 0; i < kGroupWords<kType>; ++i) {
    take(v.w[i] << 1);  // without the sign; of two codes in a word the lower one is below what is compared first
    if constexpr (item_size(kType) == 2) take(v.w[i] << 17);
  }
  return most >> (item_size(kType) == 2 ? 17 : 1);
}

// The same without NaN.
template <DType kType>
HETKV_INLINE std::uint32_t largest_number(const Elements<kType>& v) {
  constexpr FloatFormat format = format_of(kType);
  std::uint32_t most = 0;
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) {
    const std::uint32_t code = element<item_size(kType)>(v, i) & (format.sign - 1);
    if (code <= format.infinity && code > most) most = code;
  }
  return most;
}

template <DType kType>
HETKV_INLINE float value_of(std::uint32_t magnitude) {
  float low = float_from_bits(kType == DType::kBFloat16 ? magnitude << 16 : magnitude), high = 0;
  if constexpr (kType == DType::kFloat16) halves_to_floats(magnitude, low, high);
  return low;
}

HETKV_INLINE std::int32_t nearest(float value) {
#if defined(__CUDA_ARCH__)
  return __float2int_rn(value);
#else
  return static_cast<std::int32_t>(HETKV_RINT(value));
#endif
}

// Four values of less than 127.5 to int8. Rounding is an instruction: a sum with a large number, which rounds too,
// would be one with the product before it where the compiler may contract the two.
HETKV_INLINE std::uint32_t encode_quad_int8(const float* values) {
  std::uint32_t word = 0;
  HETKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    word |= (static_cast<std::uint32_t>(nearest(values[i])) & 0xFFu) << (8 * i);
  }
  return word;
}

template <DType kFrom, DType kTo>
class Quantise {
 public:
  std::uint32_t shared[kDepth];  // codes of the largest magnitudes

  HETKV_INLINE Quantise(const Job& job, std::uint32_t item) : at_(group_item(job, item)) {
    const GroupRows rows(job, job.src, at_);
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      values_[k] = Elements<kFrom>{};
      if (at_.has(k)) values_[k] = rows.template load<item_size(kFrom)>(job.runs, k);
    }
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      shared[k] = largest_code<kFrom>(values_[k]);
      if (shared[k] <= format_of(kFrom).infinity) continue;
      shared[k] = largest_number<kFrom>(values_[k]);
      nan_ |= 1u << k;
    }
  }

  HETKV_INLINE void store(const Job& job, Partial& partial) const {
    constexpr float fitting = kTo == DType::kInt8 ? 0x1.FDFFFEp6f : last_fitting<DType::kFloat8E4M3FN>();
    std::uint32_t scales[kDepth] = {};
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      if (!at_.has(k)) continue;
      const float multiplier = job.multipliers != nullptr ? job.multipliers[head_of(job, at_.first + k)] : 1.0f;
      const float found = value_of<kFrom>(shared[k]);
      const float size = found * magnitude(multiplier);
      const float scale = scale_of(size > 0.0f ? size : 0.0f, job.largest);  // 0 for NaN
      const float factor = factor_of(multiplier, scale);
      scales[k] = bits_of(scale);
      Vector<2> codes;
      if ((nan_ >> k & 1) == 0 && found * magnitude(factor) <= fitting) {
        float decoded[kGroup];
        bool ignored = false;
        decode8<kFrom>(values_[k], decoded, &ignored);
        HETKV_UNROLL
        for (int i = 0; i < static_cast<int>(kGroup); ++i) decoded[i] *= factor;
        HETKV_UNROLL
        for (int i = 0; i < 2; ++i) {
          if constexpr (kTo == DType::kInt8) {
            codes.w[i] = encode_quad_int8(decoded + 4 * i);
          } else {
            codes.w[i] = encode_quad8<kTo>(decoded + 4 * i);
          }
        }
      } else {
        const auto found = convert_slowly<kFrom, kTo>(values_[k], factor);
        codes = found.codes;
        partial.saturated += found.saturated;
      }
      const std::uint64_t address = codes_at(job, job.dst, at_, k);
      gpu::store<2>(address, codes);
      partial.checksum += sum(codes, word_key(job, job.seed, address));
    }
    if (at_.leads()) {
      partial.checksum += scale_words(job, scales, at_.left, job.dst_scales.base + 4ull * at_.first, true);
    }
  }

 private:
  const GroupItem at_;
  Elements<kFrom> values_[kDepth];
  std::uint32_t nan_ = 0;  // a bit for each vector that has one
};

// 8 codes to values.
template <DType kFrom>
HETKV_INLINE void decode_codes(const Vector<2>& codes, float (&values)[kGroup], bool* special) {
  if constexpr (kFrom == DType::kInt8) {
    HETKV_UNROLL
    for (int i = 0; i < static_cast<int>(kGroup); ++i) {
      values[i] = static_cast<float>(static_cast<std::int8_t>(codes.w[i / 4] >> (8 * (i % 4))));
    }
  } else {
    decode8<kFrom>(codes, values, special);
  }
}

template <DType kFrom, DType kTo>
class Apply {
 public:
  std::uint32_t shared[kDepth] = {};  // scales; the leader's, so that they are read once

  HETKV_INLINE Apply(const Job& job, std::uint32_t item) : at_(group_item(job, item)), rows_(job, job.dst, at_) {
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; k += 2) {
      if (k >= at_.left || !at_.leads()) continue;
      const Vector<2> word = load<2>(scales_at(job) + 4 * k);
      shared[k] = word.w[0];
      if (k + 1 < at_.left) shared[k + 1] = word.w[1];
    }
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      codes_[k] = Vector<2>{};
      if (at_.has(k)) codes_[k] = load<2>(codes_at(job, job.src, at_, k));
    }
  }

  HETKV_INLINE void store(const Job& job, Partial& partial) const {
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      if (!at_.has(k)) continue;
      const float constant = job.multipliers != nullptr ? job.multipliers[head_of(job, at_.first + k)] : 1.0f;
      const float multiplier = float_from_bits(shared[k]) * constant;
      float values[kGroup];
      bool special = false;
      decode_codes<kFrom>(codes_[k], values, &special);
      HETKV_UNROLL
      for (int i = 0; i < static_cast<int>(kGroup); ++i) values[i] *= multiplier;
      Elements<kTo> to = encode8<kTo>(values, &special);
      if (special) {
        const auto found = convert_slowly<kFrom, kTo>(codes_[k], multiplier);
        to = found.codes;
        partial.saturated += found.saturated;
      }
      rows_.template store<item_size(kTo)>(job.runs, k, to);
      if (job.wire == remap::WireSide::kDestination) {
        partial.checksum += sum(to, word_key(job, job.seed, rows_[k]));
      } else if (job.wire == remap::WireSide::kSource) {
        partial.checksum += sum(codes_[k], word_key(job, job.seed, codes_at(job, job.src, at_, k)));
      }
    }
    if (at_.leads() && job.wire == remap::WireSide::kSource) {
      partial.checksum += scale_words(job, shared, at_.left, scales_at(job), false);
    }
  }

 private:
  HETKV_INLINE std::uint64_t scales_at(const Job& job) const { return job.src_scales.base + 4ull * at_.first; }

  const GroupItem at_;
  const GroupRows rows_;
  Vector<2> codes_[kDepth];
};

// Calls body(TypeOf<values>, TypeOf<codes>) for the job's two dtypes.
template <typename Body>
HETKV_INLINE void with_group_types(DType values, DType codes, const Body& body) {
  const auto with_values = [&](auto type) {
    if (codes == DType::kInt8) return body(type, TypeOf<DType::kInt8>{});
    body(type, TypeOf<DType::kFloat8E4M3FN>{});
  };
  if (values == DType::kFloat32) return with_values(TypeOf<DType::kFloat32>{});
  if (values == DType::kFloat16) return with_values(TypeOf<DType::kFloat16>{});
  with_values(TypeOf<DType::kBFloat16>{});
}

template <typename Thread>
struct ThreadOf {
  using type = Thread;
};

// Calls body(ThreadOf<Quantise or Apply of the job's dtypes>).
template <typename Body>
HETKV_INLINE void with_cluster(const Job& job, const Body& body) {
  if (job.path == Path::kQuantise) {
    return with_group_types(job.src.dtype, job.dst.dtype, [&](auto values, auto codes) {
      body(ThreadOf<Quantise<decltype(values)::value, decltype(codes)::value>>{});
    });
  }
  with_group_types(job.dst.dtype, job.src.dtype, [&](auto values, auto codes) {
    body(ThreadOf<Apply<decltype(codes)::value, decltype(values)::value>>{});
  });
}

}  // namespace hetkv::gpu
