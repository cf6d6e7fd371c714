#include "remap/scaled.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "convert.h"

namespace hetkv::remap {
namespace {

Bytes* pointer(std::uint64_t at) {
  return reinterpret_cast<Bytes*>(static_cast<std::uintptr_t>(at));
}

Bytes* at(const Side& side, const SegmentMap& map, std::int64_t token, std::int64_t head, std::int64_t channel) {
  return pointer(address(map, side.blocks, side.first_token + token, side.first_head + static_cast<std::int32_t>(head),
                         static_cast<std::int32_t>(channel)));
}

// Tokens from `token` to the end of its block.
std::int64_t block_tokens(const Side& side, std::int64_t token, std::int64_t limit) {
  if (side.map.block_size == 0) return limit;
  return std::min<std::int64_t>(limit, side.map.block_size - (side.first_token + token) % side.map.block_size);
}

bool dense(const SegmentMap& map, std::int64_t channels) {
  return map.pack >= channels && map.inner_stride == item_size(map.dtype);
}

// The largest divisor of `channels` that is at most `limit`.
std::int64_t divisor(std::int64_t channels, std::int64_t limit) {
  std::int64_t best = std::min(channels, limit);
  while (channels % best != 0) --best;
  return best;
}

// The shape of a row of `unit` channels: `packs` runs of `pack` channels, `outer` bytes from one to the next.
struct Channels {
  std::int64_t pack, packs, outer;
  Channels(const SegmentMap& map, std::int64_t unit)
      : pack(std::min<std::int64_t>(map.pack, unit)), packs(unit / pack), outer(map.outer_stride) {}
};

}  // namespace

ScaledRunner::ScaledRunner(const Job& job, const Kernels& kernels, std::uint64_t seed)
    : job_(job),
      kernels_(kernels),
      seed_(seed),
      from_size_(item_size(job.src.map.dtype)),
      to_size_(item_size(job.dst.map.dtype)),
      from_(static_cast<int>(job.src.map.dtype) - 1),
      to_(static_cast<int>(job.dst.map.dtype) - 1) {
  const std::int64_t channels = std::max(job.channels, 1);
  const std::int64_t source = job.src_scales.map.base != 0 ? job.src_scales.channels_per_scale : channels;
  group_ = job.dst_scales.map.base != 0 ? job.dst_scales.channels_per_scale : channels;
  unit_ = divisor(std::gcd(source, group_), kScaledElements);
  // A row is a part of a pack, or whole packs, on both sides: the second's part may cut the first's packs.
  for (const SegmentMap* map : {&job.src.map, &job.dst.map, &job.src.map}) {
    if (map->pack < channels && unit_ % map->pack != 0) unit_ = std::gcd<std::int64_t>(unit_, map->pack);
  }
  src_dense_ = dense(job.src.map, channels);
  dst_dense_ = dense(job.dst.map, channels);
  step_tokens_ = src_dense_ && dst_dense_ ? kScaledTokens : std::clamp<std::int64_t>(kScaledElements / unit_, 1, 64);
  wire_token_ = job.channels * (job.wire == WireSide::kSource ? from_size_ : to_size_);
}

void ScaledRunner::run(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end,
                       Result& result) const {
  const bool scales = job_.dst_scales.map.base != 0;
  while (token < token_end) {
    std::int64_t tokens = std::min(step_tokens_, token_end - token);
    tokens = block_tokens(job_.dst, token, block_tokens(job_.src, token, tokens));
    const std::int64_t joined = scales && job_.joint ? head_end - head : 1;
    for (std::int64_t h = head; h < head_end; h += joined) {
      const Step step{token, tokens, h};
      if (scales) scale(step, joined, result);
      if (!scales) apply(step, result);
    }
    if (sums_in_parts()) {
      const Side& wire = job_.wire == WireSide::kSource ? job_.src : job_.dst;
      for (std::int64_t h = head; h < head_end; ++h) {
        const Bytes* first = at(wire, wire.map, token, h, 0);
        const auto offset = static_cast<std::uint64_t>(first - pointer(wire.map.base));
        result.checksum += kernels_.checksum(first, tokens * wire_token_, (job_.wire_offset + offset) / 8, seed_);
      }
    }
    token += tokens;
  }
}

std::uint64_t ScaledRunner::sum_rest() const {
  if (job_.wire == WireSide::kNone) return 0;
  const bool source = job_.wire == WireSide::kSource;
  const std::int64_t rows = job_.tokens * job_.heads;
  std::uint64_t total = 0;
  if (!sums_in_parts()) {
    const Bytes* codes = pointer((source ? job_.src : job_.dst).map.base);
    total += kernels_.checksum(codes, rows * wire_token_, job_.wire_offset / 8, seed_);
  }
  const Scales& scales = source ? job_.src_scales : job_.dst_scales;
  if (scales.map.base != 0) {
    const std::int64_t bytes = rows * (job_.channels / scales.channels_per_scale) * 4;
    total += kernels_.checksum(pointer(scales.map.base), bytes, job_.wire_scale_offset / 8, seed_);
  }
  return total;
}

void ScaledRunner::apply(const Step& step, Result& result) const {
  float factors[kScaledTokens];
  for (std::int64_t c = 0; c < job_.channels; c += unit_) {
    multipliers(step, c, factors);
    result.saturated += convert(step, c, factors);
  }
}

// Finds the destination's scales of `heads` heads, one for all of them together, then the codes.
void ScaledRunner::scale(const Step& step, std::int64_t heads, Result& result) const {
  const float largest = job_.largest > 0 ? job_.largest : largest_scaled(job_.dst.map.dtype);
  float scales[kScaledTokens], found[kScaledTokens], factors[kScaledTokens];
  for (std::int64_t group = 0; group < job_.channels; group += group_) {
    std::fill(scales, scales + step.tokens, 0.0f);
    for (std::int64_t h = 0; h < heads; ++h) {
      const Step one{step.token, step.tokens, step.head + h};
      for (std::int64_t c = group; c < group + group_; c += unit_) {
        multipliers(one, c, factors);
        amax(one, c, found);
        for (std::int64_t t = 0; t < step.tokens; ++t) {
          scales[t] = std::max(scales[t], found[t] * std::fabs(factors[t]));
        }
      }
    }
    for (std::int64_t t = 0; t < step.tokens; ++t) scales[t] = scale_of(scales[t], largest);
    for (std::int64_t h = 0; h < heads; ++h) {
      const Step one{step.token, step.tokens, step.head + h};
      Bytes* out = at(job_.dst, job_.dst_scales.map, one.token, one.head, group / group_);
      for (std::int64_t t = 0; t < step.tokens; ++t) {
        std::memcpy(out + t * job_.dst_scales.map.token_stride, scales + t, 4);
      }
      for (std::int64_t c = group; c < group + group_; c += unit_) {
        multipliers(one, c, factors);
        for (std::int64_t t = 0; t < step.tokens; ++t) factors[t] = factor_of(factors[t], scales[t]);
        result.saturated += convert(one, c, factors);
      }
    }
  }
}

// What each token's codes are multiplied by to be values.
void ScaledRunner::multipliers(const Step& step, std::int64_t channel, float* out) const {
  const float constant = job_.multipliers != nullptr ? job_.multipliers[step.head] : 1.0f;
  std::fill(out, out + step.tokens, constant);
  if (job_.src_scales.map.base == 0) return;
  const SegmentMap& map = job_.src_scales.map;
  const Bytes* scales = at(job_.src, map, step.token, step.head, channel / job_.src_scales.channels_per_scale);
  for (std::int64_t t = 0; t < step.tokens; ++t) {
    float scale;
    std::memcpy(&scale, scales + t * map.token_stride, 4);
    out[t] = scale * constant;
  }
}

Rows ScaledRunner::rows(const Step& step, std::int64_t channel) const {
  const std::int64_t ahead = step.head + 1 < job_.heads ? 1 : 0;  // the next head is what comes after this one
  return {at(job_.dst, job_.dst.map, step.token, step.head, channel),
          at(job_.src, job_.src.map, step.token, step.head, channel),
          step.tokens,
          job_.dst.map.token_stride,
          job_.src.map.token_stride,
          ahead * job_.dst.map.head_stride,
          ahead * job_.src.map.head_stride};
}

// Gathers the rows of a source whose channels are not contiguous.
Rows ScaledRunner::gather(const Rows& whole, Bytes* tile) const {
  const std::int64_t row = unit_ * from_size_;
  const Channels c(job_.src.map, unit_);
  const Axis axes[3] = {{whole.count, whole.src_step, row},
                        {c.packs, c.outer, c.pack * from_size_},
                        {c.pack, job_.src.map.inner_stride, from_size_}};
  MovePlan(axes, 3, static_cast<int>(from_size_)).run(kernels_, {tile, whole.src, 0, whole.src_ahead});
  return {whole.dst, tile, whole.count, whole.dst_step, row, whole.dst_ahead, 0};
}

void ScaledRunner::amax(const Step& step, std::int64_t channel, float* out) const {
  alignas(64) Bytes tile[kScaledElements * 4];
  std::fill(out, out + step.tokens, 0.0f);
  const Rows whole = rows(step, channel);
  kernels_.amax_rows[from_](src_dense_ ? whole : gather(whole, tile), unit_, out);
}

std::uint64_t ScaledRunner::convert(const Step& step, std::int64_t channel, const float* factors) const {
  alignas(64) Bytes from[kScaledElements * 4];
  alignas(64) Bytes to[kScaledElements * 4];
  const Rows whole = rows(step, channel);
  Rows move = src_dense_ ? whole : gather(whole, from);
  if (dst_dense_) return kernels_.convert_rows[from_][to_](move, unit_, factors, 1);
  move.dst = to;
  move.dst_step = unit_ * to_size_;
  move.dst_ahead = 0;
  const std::uint64_t saturated = kernels_.convert_rows[from_][to_](move, unit_, factors, 1);
  const Channels c(job_.dst.map, unit_);
  const Axis axes[3] = {{step.tokens, move.dst_step, whole.dst_step},
                        {c.packs, c.pack * to_size_, c.outer},
                        {c.pack, to_size_, job_.dst.map.inner_stride}};
  MovePlan(axes, 3, static_cast<int>(to_size_)).run(kernels_, {whole.dst, to, whole.dst_ahead, 0});
  return saturated;
}

}  // namespace hetkv::remap
