#include "remap/job.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace hetkv::remap {
namespace {

constexpr std::int64_t kPieceBytes = 16 * 1024;  // of one side: this piece and the next fit the caches on both sides
constexpr std::int64_t kMaxWindow = 256;         // tokens
constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kTileElements = 2048;  // of a conversion that goes through a tile
constexpr std::int64_t kSnapshotBytes = 128 * 1024;
constexpr std::int64_t kShortRun = 16;  // elements; shorter runs are converted in a tile

Bytes* pointer(std::uint64_t at) {
  return reinterpret_cast<Bytes*>(static_cast<std::uintptr_t>(at));
}

Bytes* at(const Side& side, std::int64_t token, std::int64_t head, std::int64_t channel) {
  return pointer(address(side.map, side.blocks, side.first_token + token,
                         side.first_head + static_cast<std::int32_t>(head), static_cast<std::int32_t>(channel)));
}

// Tokens from `token` on whose addresses keep one stride: to the end of the block, and on through blocks that follow it
// in memory where the stride goes on as well.
std::int64_t affine_tokens(const Side& side, std::int64_t token, std::int64_t limit) {
  const SegmentMap& map = side.map;
  if (map.block_size == 0) return limit;
  token += side.first_token;
  std::int64_t block = token / map.block_size;
  std::int64_t count = map.block_size - token % map.block_size;
  if (map.block_stride != map.block_size * map.token_stride) return std::min(count, limit);
  for (; count < limit && side.blocks[block + 1] == side.blocks[block] + 1; ++block) count += map.block_size;
  return std::min(count, limit);
}

std::int64_t outer_step(const SegmentMap& map, std::int64_t inner, std::int64_t channels) {
  return std::min<std::int64_t>(map.pack, channels) == inner ? map.outer_stride : inner * map.inner_stride;
}

// A piece of a payload that was received. A peer may still write to its slot: what is summed must be what is unpacked.
alignas(64) thread_local Bytes snapshot[kSnapshotBytes];

}  // namespace

JobRunner::JobRunner(const Job& job, const Kernels& kernels, std::uint64_t seed)
    : job_(job),
      kernels_(kernels),
      from_size_(item_size(job.src.map.dtype)),
      to_size_(item_size(job.dst.map.dtype)),
      converts_(job.src.map.dtype != job.dst.map.dtype || job.multipliers != nullptr),
      sums_(sums_in_parts(job)) {
  const std::int64_t channels = std::max(job.channels, 1);
  const std::int64_t s = std::min<std::int64_t>(job.src.map.pack, channels);
  const std::int64_t d = std::min<std::int64_t>(job.dst.map.pack, channels);
  span_ = std::max(s, d);
  inner_ = std::min(s, d);
  if (channels % s != 0 || channels % d != 0 || span_ % inner_ != 0) {
    inner_ = std::gcd(std::gcd(s, d), channels);
    span_ = inner_;
  }
  sum_.source = job.wire == WireSide::kSource;
  sum_.origin = pointer((sum_.source ? job.src : job.dst).map.base);
  sum_.first = job.wire_offset / 8;
  sum_.seed = seed;
  wire_token_ = job.channels * (sum_.source ? from_size_ : to_size_);
}

bool JobRunner::reads_once(const Job& job) {
  if (job.wire != WireSide::kSource) return true;
  if (!sums_in_parts(job)) return false;
  const std::int64_t size = item_size(job.src.map.dtype);
  const bool plain = job.src.map.dtype == job.dst.map.dtype && job.multipliers == nullptr &&
                     job.dst.map.pack >= job.channels && job.dst.map.inner_stride == size;
  return plain || job.channels * size <= kSnapshotBytes;
}

void JobRunner::start(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end) {
  token_ = window_ = window_end_ = token;
  token_end_ = token_end;
  first_head_ = head;
  head_ = head_end_ = head_end;
  piece_heads_ = 0;
  pending_ = next(piece_);
}

void JobRunner::step(Result& result, const JobRunner* following) {
  const Piece current = piece_;
  pending_ = next(piece_);
  const Piece* after = pending_ ? &piece_ : nullptr;
  if (after == nullptr && following != nullptr && following->pending_) after = &following->piece_;
  run(current, after, result);
}

void JobRunner::open_window() {
  window_ = window_end_;
  std::int64_t tokens = affine_tokens(job_.dst, window_, affine_tokens(job_.src, window_, token_end_ - window_));
  std::int64_t heads = head_end_ - first_head_;
  const std::int64_t row = job_.channels * std::max(from_size_, to_size_);
  // Pools that keep all heads of a token together are walked token by token; where tokens are within one cache line,
  // the whole block of few heads is taken instead.
  const SegmentMap& pool = job_.src.map.block_size > 0 ? job_.src.map : job_.dst.map;
  bool token_by_token = pool.token_stride >= pool.head_stride;
  for (const Side* side : {&job_.src, &job_.dst}) {
    const SegmentMap& map = side->map;
    if (map.block_size <= 1 || map.token_stride >= kLineBytes) continue;
    token_by_token = false;
    const std::int64_t to_block_end = map.block_size - (side->first_token + window_) % map.block_size;
    if (to_block_end <= kMaxWindow) tokens = std::max(tokens, to_block_end);
  }
  tokens = std::min(tokens, token_end_ - window_);
  window_end_ = window_ + tokens;
  if (token_by_token) {
    tokens = std::clamp(kPieceBytes / (row * heads) / 4 * 4, std::min<std::int64_t>(4, tokens), tokens);
  }
  piece_heads_ = std::clamp(kPieceBytes / (row * tokens), std::int64_t{1}, heads);
  piece_tokens_ = std::clamp(kPieceBytes / (row * piece_heads_) / 64 * 64, std::min<std::int64_t>(64, tokens), tokens);
  const std::int64_t copied = std::max<std::int64_t>(kSnapshotBytes / std::max<std::int64_t>(wire_token_, 1), 1);
  if (sums_ && sum_.source) piece_tokens_ = std::min(piece_tokens_, copied);
}

bool JobRunner::next(Piece& piece) {
  if (token_ == window_end_) {
    head_ += piece_heads_;
    if (head_ >= head_end_) {
      if (window_end_ >= token_end_ || first_head_ >= head_end_) return false;
      open_window();
      head_ = first_head_;
    }
    token_ = window_;
    stretch_ = 0;
  }
  if (stretch_ == 0) {
    stretch_ = affine_tokens(job_.dst, token_, affine_tokens(job_.src, token_, window_end_ - token_));
  }
  piece.window = window_;
  piece.token = token_;
  piece.head = head_;
  piece.tokens = std::min(piece_tokens_, stretch_);
  piece.heads = std::min(piece_heads_, head_end_ - head_);
  piece.dst = at(job_.dst, piece.token, piece.head, 0);
  piece.src = at(job_.src, piece.token, piece.head, 0);
  token_ += piece.tokens;
  stretch_ -= piece.tokens;
  return true;
}

void JobRunner::plan(const Piece& piece) {
  plan_tokens_ = piece.tokens;
  plan_heads_ = piece.heads;
  const SegmentMap& s = job_.src.map;
  const SegmentMap& d = job_.dst.map;
  token_axis_ = {piece.tokens, s.token_stride, d.token_stride};
  outer_axis_ = {span_ / inner_, outer_step(s, inner_, job_.channels), outer_step(d, inner_, job_.channels)};
  inner_axis_ = {inner_, s.inner_stride, d.inner_stride};
  Axis axes[kMaxAxes] = {token_axis_, outer_axis_, inner_axis_, {piece.heads, s.head_stride, d.head_stride}};
  src_head_ = s.head_stride;
  const bool reads_once = !converts_ && MovePlan(axes, kMaxAxes, static_cast<int>(from_size_)).can_sum();
  const std::int64_t head_bytes = piece.tokens * wire_token_;
  snapshots_ = sums_ && sum_.source && !reads_once && piece.heads * head_bytes <= kSnapshotBytes;
  if (snapshots_) axes[kMaxAxes - 1].src = src_head_ = head_bytes;
  if (!converts_) {
    move_ = MovePlan(axes, kMaxAxes, static_cast<int>(from_size_));
  } else {
    runs_ = ConvertPlan(axes, job_.multipliers != nullptr ? 3 : 4, s.dtype, d.dtype);
    direct_ = runs_.run_length() >= kShortRun;
  }
}

void JobRunner::run(const Piece& piece, const Piece* after, Result& result) {
  if (piece.tokens != plan_tokens_ || piece.heads != plan_heads_) plan(piece);
  const std::int64_t dst_ahead = after != nullptr ? after->dst - piece.dst : 0;
  const Bytes* src = piece.src;
  if (snapshots_) {
    for (std::int64_t h = 0; h < piece.heads; ++h) {
      std::memcpy(snapshot + h * src_head_, piece.src + h * job_.src.map.head_stride,
                  static_cast<std::size_t>(src_head_));
      const std::uint64_t index = sum_.first + static_cast<std::uint64_t>(piece.src - sum_.origin) / 8 +
                                  static_cast<std::uint64_t>(h * job_.src.map.head_stride) / 8;
      result.checksum += kernels_.checksum(snapshot + h * src_head_, src_head_, index, sum_.seed);
    }
    src = snapshot;
  }
  const std::int64_t src_ahead = after != nullptr ? after->src - src : 0;
  const bool sums_on_the_way = sums_ && !converts_ && !snapshots_ && move_.can_sum();
  for (std::int64_t c = 0; c < job_.channels; c += span_) {
    const Move move{at(job_.dst, piece.token, piece.head, c),
                    src + (at(job_.src, piece.token, piece.head, c) - piece.src), dst_ahead, src_ahead};
    if (converts_) {
      result.saturated += convert(piece, move);
    } else {
      result.checksum += move_.run(kernels_, move, sums_on_the_way ? &sum_ : nullptr);
    }
  }
  if (sums_ && !sums_on_the_way && !snapshots_) result.checksum += sum(piece);
}

// Checksum of the piece's part of the payload: one contiguous run a head.
std::uint64_t JobRunner::sum(const Piece& piece) const {
  std::uint64_t total = 0;
  for (std::int64_t h = piece.head; h < piece.head + piece.heads; ++h) {
    const Bytes* wire = at(sum_.source ? job_.src : job_.dst, piece.token, h, 0);
    const std::uint64_t index = sum_.first + static_cast<std::uint64_t>(wire - sum_.origin) / 8;
    total += kernels_.checksum(wire, piece.tokens * wire_token_, index, sum_.seed);
  }
  return total;
}

std::uint64_t JobRunner::convert(const Piece& piece, const Move& move) const {
  if (direct_ && job_.multipliers == nullptr) return runs_.run(kernels_, move, 1.0f);
  std::uint64_t saturated = 0;
  for (std::int64_t h = 0; h < piece.heads; ++h) {
    const float multiplier = job_.multipliers != nullptr ? job_.multipliers[piece.head + h] : 1.0f;
    const Move one{move.dst + h * job_.dst.map.head_stride, move.src + h * src_head_, move.dst_ahead, move.src_ahead};
    saturated += direct_ ? runs_.run(kernels_, one, multiplier) : convert_tiles(one, piece.tokens, multiplier);
  }
  return saturated;
}

// Converts one head's [token][channel] piece through tiles that stay in the first cache.
std::uint64_t JobRunner::convert_tiles(const Move& move, std::int64_t tokens, float multiplier) const {
  const std::int64_t inner_step = std::min(inner_axis_.count, kTileElements);
  const std::int64_t outer_step = std::min(outer_axis_.count, std::max<std::int64_t>(1, kTileElements / inner_step));
  const std::int64_t token_step = std::max<std::int64_t>(1, kTileElements / (inner_step * outer_step));
  std::uint64_t saturated = 0;
  for (std::int64_t t = 0; t < tokens; t += token_step) {
    for (std::int64_t o = 0; o < outer_axis_.count; o += outer_step) {
      for (std::int64_t i = 0; i < inner_axis_.count; i += inner_step) {
        const Move tile{move.dst + t * token_axis_.dst + o * outer_axis_.dst + i * inner_axis_.dst,
                        move.src + t * token_axis_.src + o * outer_axis_.src + i * inner_axis_.src, move.dst_ahead,
                        move.src_ahead};
        saturated += convert_tile(tile, std::min(token_step, tokens - t), std::min(outer_step, outer_axis_.count - o),
                                  std::min(inner_step, inner_axis_.count - i), multiplier);
      }
    }
  }
  return saturated;
}

std::uint64_t JobRunner::convert_tile(const Move& move, std::int64_t tokens, std::int64_t outer, std::int64_t inner,
                                      float multiplier) const {
  alignas(64) Bytes from[kTileElements * 4];
  alignas(64) Bytes to[kTileElements * 4];
  const std::int64_t fs = from_size_;
  const std::int64_t ts = to_size_;
  const std::int64_t row = outer * inner;
  const Axis gather[3] = {
      {tokens, token_axis_.src, row * fs}, {outer, outer_axis_.src, inner * fs}, {inner, inner_axis_.src, fs}};
  const Axis scatter[3] = {
      {tokens, row * ts, token_axis_.dst}, {outer, inner * ts, outer_axis_.dst}, {inner, ts, inner_axis_.dst}};
  const Axis whole[1] = {{tokens * row, fs, ts}};
  MovePlan(gather, 3, static_cast<int>(fs)).run(kernels_, {from, move.src, 0, move.src_ahead});
  const std::uint64_t saturated =
      ConvertPlan(whole, 1, job_.src.map.dtype, job_.dst.map.dtype).run(kernels_, {to, from, 0, 0}, multiplier);
  MovePlan(scatter, 3, static_cast<int>(ts)).run(kernels_, {move.dst, to, move.dst_ahead, 0});
  return saturated;
}

}  // namespace hetkv::remap
