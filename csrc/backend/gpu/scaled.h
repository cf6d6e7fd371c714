// The path of jobs with scales that takes any maps, dtypes and groups. A unit is the larger of the two sides' groups of
// channels, of one token and head; a thread takes kScaledUnits units that follow each other in canonical order, element
// by element, so that all it sums are whole words.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"
#include "backend/gpu/words.h"

namespace hetkv::gpu {

// Sums elements that follow each other on the wire.
class WordSum {
 public:
  // `word` counts from 1 at the payload's first.
  HETKV_INLINE WordSum(std::uint64_t seed, std::uint64_t word) : key_(seed + word * remap::kChecksumStep) {}

  HETKV_INLINE void add(std::uint32_t code, int size) {
    word_ |= static_cast<std::uint64_t>(code) << bits_;
    bits_ += 8 * size;
    if (bits_ == 64) flush();
  }
  // Bytes that are missing in the last word, which are zero.
  HETKV_INLINE int missing() const { return bits_ == 0 ? 0 : (64 - bits_) / 8; }
  HETKV_INLINE std::uint64_t total() {
    if (bits_ > 0) flush();
    return total_;
  }

 private:
  HETKV_INLINE void flush() {
    total_ += mix(word_, key_);
    key_ += remap::kChecksumStep;
    word_ = 0;
    bits_ = 0;
  }
  std::uint64_t key_, word_ = 0, total_ = 0;
  int bits_ = 0;
};

// Of the scale of the position's channel. `side` has the block table.
HETKV_INLINE std::uint64_t scale_address(const Side& side, const ScaleSide& scales, const Position& at) {
  const std::int64_t group = at.channel / scales.channels;
  const std::uint64_t row =
      scales.base + static_cast<std::uint64_t>(at.head * scales.head_stride + group * scales.group_stride);
  if (side.blocks == nullptr) return row + static_cast<std::uint64_t>(at.token * scales.token_stride);
  std::uint32_t block = side.first_token + at.token;
  const std::uint32_t in_block = side.block_size.split(block);
  return row + static_cast<std::uint64_t>(side.blocks[block] * scales.block_stride + in_block * scales.token_stride);
}

// One thread's units.
class ScaledItem {
 public:
  HETKV_INLINE ScaledItem(const Job& job, std::uint32_t first)
      : job_(job),
        from_size_(item_size(job.src.dtype)),
        to_size_(item_size(job.dst.dtype)),
        from_wire_(job.wire == remap::WireSide::kSource),
        to_wire_(job.wire == remap::WireSide::kDestination),
        codes_(job.seed, job.wire_origin + channels_before(first) * (from_wire_ ? from_size_ : to_size_) / 8),
        scales_(job.seed, job.scale_origin + scales_before(first) / 2) {}

  HETKV_INLINE void run(std::uint32_t unit) {
    Position at;
    at.channel = job_.row_groups.split(unit) * job_.group_channels;
    at.token = job_.token_count.split(unit);
    at.head = unit;
    const bool found = job_.dst_scales.base != 0;
    const std::uint32_t group = found ? job_.dst_scales.channels : job_.group_channels;
    const std::uint32_t end = at.channel + job_.group_channels;
    for (; at.channel < end; at.channel += group) {
      std::uint32_t scale = 0;
      if (found) {
        scale = bits_of(find(at));
        scale_end_ = scale_address(job_.dst, job_.dst_scales, at);
        store_element(scale_end_, 4, scale);
        scale_end_ += 4;
        if (to_wire_) scales_.add(scale, 4);
      }
      convert(at, at.channel + group, found, float_from_bits(scale));
    }
  }

  // What was summed and clamped; the wire's last words are filled up with zeros.
  HETKV_INLINE Partial end(bool last) {
    if (last && to_wire_) {
      for (int i = 0; i < codes_.missing(); ++i) store_element(code_end_ + static_cast<std::uint64_t>(i), 1, 0);
      for (int i = 0; i < scales_.missing(); ++i) store_element(scale_end_ + static_cast<std::uint64_t>(i), 1, 0);
    }
    Partial partial;
    partial.checksum = codes_.total() + scales_.total();
    partial.saturated = saturated_;
    return partial;
  }

 private:
  HETKV_INLINE std::uint64_t channels_before(std::uint32_t unit) const {
    return static_cast<std::uint64_t>(unit) * job_.group_channels;
  }
  HETKV_INLINE std::uint64_t scales_before(std::uint32_t unit) const {
    const ScaleSide& scales = from_wire_ ? job_.src_scales : job_.dst_scales;
    return scales.base == 0 ? 0 : channels_before(unit) / scales.channels;
  }
  HETKV_INLINE float constant(std::uint32_t head) const {
    return job_.multipliers != nullptr ? job_.multipliers[head] : 1.0f;
  }
  // What the codes from `at` on, of one group of the source, are multiplied by to be values.
  HETKV_INLINE float multiplier(const Position& at, std::uint32_t* scale) const {
    if (job_.src_scales.base == 0) return constant(at.head);
    *scale = load_element(scale_address(job_.src, job_.src_scales, at), 4);
    return float_from_bits(*scale) * constant(at.head);
  }
  HETKV_INLINE bool begins_group(std::uint32_t channel, std::uint32_t first) const {
    return channel == first || (job_.src_scales.base != 0 && channel % job_.src_scales.channels == 0);
  }

  // The scale of the destination's group that begins at `of`.
  HETKV_INLINE float find(const Position& of) const {
    Position at = of;
    const std::uint32_t stop = job_.joint ? job_.heads.divisor : of.head + 1;
    float most = 0, factor = 1;
    std::uint32_t ignored = 0;
    for (at.head = job_.joint ? 0 : of.head; at.head < stop; ++at.head) {
      for (at.channel = of.channel; at.channel < of.channel + job_.dst_scales.channels; ++at.channel) {
        if (begins_group(at.channel, of.channel)) factor = multiplier(at, &ignored);
        const std::uint32_t code = load_element(element_address(job_.src, at), from_size_);
        const float size = float_from_bits(bits_of(decode_scaled(job_.src.dtype, code)) & 0x7FFFFFFFu) *
                           float_from_bits(bits_of(factor) & 0x7FFFFFFFu);
        if (size > most) most = size;  // false for NaN
      }
    }
    return scale_of(most, job_.largest);
  }

  HETKV_INLINE void convert(Position at, std::uint32_t end, bool found, float scale) {
    float factor = 1;
    const std::uint32_t first = at.channel;
    for (; at.channel < end; ++at.channel) {
      if (begins_group(at.channel, first)) {
        std::uint32_t read = 0;
        factor = multiplier(at, &read);
        if (found) factor = factor_of(factor, scale);
        const bool whole = job_.src_scales.base != 0 && at.channel % job_.src_scales.channels == 0;
        if (from_wire_ && whole) scales_.add(read, 4);
      }
      const std::uint32_t code = load_element(element_address(job_.src, at), from_size_);
      const std::uint64_t converted = convert_scaled(job_.src.dtype, job_.dst.dtype, code, factor);
      const std::uint32_t result = static_cast<std::uint32_t>(converted);
      saturated_ += static_cast<std::uint32_t>(converted >> 32);
      code_end_ = element_address(job_.dst, at);
      store_element(code_end_, to_size_, result);
      code_end_ += static_cast<std::uint64_t>(to_size_);
      if (from_wire_) codes_.add(code, from_size_);
      if (to_wire_) codes_.add(result, to_size_);
    }
  }

  const Job& job_;
  const int from_size_, to_size_;
  const bool from_wire_, to_wire_;
  WordSum codes_, scales_;
  std::uint64_t code_end_ = 0, scale_end_ = 0;
  std::uint32_t saturated_ = 0;
};

HETKV_CALL Partial convert_units(const Job& job, std::uint32_t item) {
  const std::uint32_t first = item * kScaledUnits;
  if (first >= job.groups) return {};
  const std::uint32_t count = job.groups - first < kScaledUnits ? job.groups - first : kScaledUnits;
  ScaledItem run(job, first);
  HETKV_ROLLED
  for (std::uint32_t i = 0; i < count; ++i) run.run(first + i);
  return run.end(first + count == job.groups);
}

}  // namespace hetkv::gpu
