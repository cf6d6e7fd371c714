#include "remap/remap.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <numeric>

#include "convert.h"
#include "remap/isa.h"
#include "remap/plan.h"
#include "remap/threads.h"

namespace hetkv {
namespace {

constexpr std::int64_t kPieceBytes = 32 * 1024;  // of one side; both sides of a piece stay in the caches
constexpr std::int64_t kTileElements = 2048;     // of a conversion that goes through a tile
constexpr std::int64_t kShortRun = 16;           // elements; shorter runs are converted in a tile
constexpr std::int64_t kBytesPerThread = 128 * 1024;

Bytes* pointer(std::uint64_t at) {
  return reinterpret_cast<Bytes*>(static_cast<std::uintptr_t>(at));
}

// Tokens from `token` on whose addresses keep one stride: to the end of the block, and on through blocks that follow it
// in memory where the stride goes on as well.
std::int64_t affine_tokens(const RemapSide& side, std::int64_t token, std::int64_t limit) {
  const SegmentMap& map = side.map;
  if (map.block_size == 0) return limit;
  token += side.first_token;
  std::int64_t block = token / map.block_size;
  std::int64_t count = map.block_size - token % map.block_size;
  if (map.block_stride != map.block_size * map.token_stride) return std::min(count, limit);
  for (; count < limit && side.blocks[block + 1] == side.blocks[block] + 1; ++block) count += map.block_size;
  return std::min(count, limit);
}

// How the channel axis is cut so that both sides are affine in (outer, inner) within `span` channels.
struct ChannelSplit {
  std::int64_t span = 1;
  std::int64_t inner = 1;

  ChannelSplit(const SegmentMap& src, const SegmentMap& dst, std::int64_t channels) {
    const std::int64_t s = std::min<std::int64_t>(src.pack, channels);
    const std::int64_t d = std::min<std::int64_t>(dst.pack, channels);
    span = std::max(s, d);
    inner = std::min(s, d);
    if (channels % s != 0 || channels % d != 0 || span % inner != 0) {
      inner = std::gcd(std::gcd(s, d), channels);
      span = inner;
    }
  }
};

std::int64_t outer_step(const SegmentMap& map, std::int64_t inner, std::int64_t channels) {
  return std::min<std::int64_t>(map.pack, channels) == inner ? map.outer_stride : inner * map.inner_stride;
}

// Runs parts of one job on one thread.
class JobRunner {
 public:
  JobRunner(const RemapJob& job, const Kernels& kernels, std::uint64_t seed)
      : job_(job),
        kernels_(kernels),
        from_size_(item_size(job.src.map.dtype)),
        to_size_(item_size(job.dst.map.dtype)),
        converts_(job.src.map.dtype != job.dst.map.dtype || job.multipliers != nullptr),
        split_(job.src.map, job.dst.map, job.channels) {
    sum_.source = job.wire == WireSide::kSource;
    sum_.origin = pointer((sum_.source ? job.src : job.dst).map.base);
    sum_.first = job.wire_offset / 8;
    sum_.seed = seed;
    wire_token_ = job.channels * (sum_.source ? from_size_ : to_size_);
  }

  // Every token of a head starts at a whole word of the payload, so that any part of the job can be summed by itself.
  bool sums_in_parts() const { return job_.wire != WireSide::kNone && wire_token_ % 8 == 0; }

  void run(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end, RemapResult& result) {
    const SegmentMap& pool = job_.src.map.block_size > 0 ? job_.src.map : job_.dst.map;
    const bool by_token = pool.token_stride >= pool.head_stride;
    const std::int64_t row = job_.channels * std::max(from_size_, to_size_);
    while (token < token_end) {
      std::int64_t count = affine_tokens(job_.src, token, token_end - token);
      count = affine_tokens(job_.dst, token, count);
      std::int64_t heads = head_end - head;
      std::int64_t tokens = count;
      if (by_token)
        tokens = std::clamp(kPieceBytes / (row * heads) / 16 * 16, std::min<std::int64_t>(16, count), count);
      heads = std::clamp(kPieceBytes / (row * tokens), std::int64_t{1}, heads);
      tokens = std::clamp(kPieceBytes / (row * heads) / 64 * 64, std::min<std::int64_t>(tokens, 64), tokens);
      for (std::int64_t t = 0; t < count; t += tokens) {
        for (std::int64_t h = head; h < head_end; h += heads) {
          piece(token + t, std::min(tokens, count - t), h, std::min(heads, head_end - h), result);
        }
      }
      token += count;
    }
  }

 private:
  void piece(std::int64_t token, std::int64_t tokens, std::int64_t head, std::int64_t heads, RemapResult& result) {
    const bool sums = sums_in_parts();
    bool summed = false;
    for (std::int64_t c = 0; c < job_.channels; c += split_.span) {
      Bytes* dst = at(job_.dst, token, head, c);
      const Bytes* src = at(job_.src, token, head, c);
      if (tokens != plan_tokens_ || heads != plan_heads_) plan(tokens, heads);
      if (converts_) {
        convert(dst, src, head, heads, tokens, result);
      } else {
        summed = sums && move_.can_sum();
        result.checksum += move_.run(kernels_, dst, src, summed ? &sum_ : nullptr);
      }
    }
    if (!sums || summed) return;
    for (std::int64_t h = head; h < head + heads; ++h) {
      const Bytes* wire = at(sum_.source ? job_.src : job_.dst, token, h, 0);
      const std::uint64_t index = sum_.first + static_cast<std::uint64_t>(wire - sum_.origin) / 8;
      result.checksum += kernels_.checksum(wire, tokens * wire_token_, index, sum_.seed);
    }
  }

  static Bytes* at(const RemapSide& side, std::int64_t token, std::int64_t head, std::int64_t channel) {
    return pointer(address(side.map, side.blocks, side.first_token + token,
                           side.first_head + static_cast<std::int32_t>(head), static_cast<std::int32_t>(channel)));
  }

  void plan(std::int64_t tokens, std::int64_t heads) {
    plan_tokens_ = tokens;
    plan_heads_ = heads;
    const SegmentMap& s = job_.src.map;
    const SegmentMap& d = job_.dst.map;
    const std::int64_t inner = split_.inner;
    const Axis token{tokens, s.token_stride, d.token_stride};
    const Axis head{heads, s.head_stride, d.head_stride};
    const Axis outer{split_.span / inner, outer_step(s, inner, job_.channels), outer_step(d, inner, job_.channels)};
    const Axis channel{inner, s.inner_stride, d.inner_stride};
    const Axis all[kMaxAxes] = {token, head, outer, channel};
    if (!converts_) {
      move_ = MovePlan(all, kMaxAxes, static_cast<int>(from_size_));
      return;
    }
    const Axis one_head[3] = {token, outer, channel};
    runs_ = job_.multipliers != nullptr ? ConvertPlan(one_head, 3, s.dtype, d.dtype)
                                        : ConvertPlan(all, kMaxAxes, s.dtype, d.dtype);
    direct_ = runs_.run_length() >= kShortRun;
    token_axis_ = token;
    outer_axis_ = outer;
    channel_axis_ = channel;
  }

  void convert(Bytes* dst, const Bytes* src, std::int64_t head, std::int64_t heads, std::int64_t tokens,
               RemapResult& result) {
    if (direct_ && job_.multipliers == nullptr) {
      result.saturated += runs_.run(kernels_, dst, src, 1.0f);
      return;
    }
    for (std::int64_t h = 0; h < heads; ++h) {
      const float multiplier = job_.multipliers != nullptr ? job_.multipliers[head + h] : 1.0f;
      Bytes* out = dst + h * job_.dst.map.head_stride;
      const Bytes* in = src + h * job_.src.map.head_stride;
      result.saturated +=
          direct_ ? runs_.run(kernels_, out, in, multiplier) : convert_tiles(out, in, tokens, multiplier);
    }
  }

  // Converts one head's [token][channel] piece through two tiles that stay in the first cache.
  std::uint64_t convert_tiles(Bytes* dst, const Bytes* src, std::int64_t tokens, float multiplier) {
    const Axis& outer = outer_axis_;
    const Axis& inner = channel_axis_;
    const std::int64_t inner_step = std::min(inner.count, kTileElements);
    const std::int64_t outer_step = std::min(outer.count, std::max<std::int64_t>(1, kTileElements / inner_step));
    const std::int64_t token_step = std::max<std::int64_t>(1, kTileElements / (inner_step * outer_step));
    std::uint64_t saturated = 0;
    for (std::int64_t t = 0; t < tokens; t += token_step) {
      for (std::int64_t o = 0; o < outer.count; o += outer_step) {
        for (std::int64_t i = 0; i < inner.count; i += inner_step) {
          saturated +=
              convert_tile(dst + t * token_axis_.dst + o * outer.dst + i * inner.dst,
                           src + t * token_axis_.src + o * outer.src + i * inner.src, std::min(token_step, tokens - t),
                           std::min(outer_step, outer.count - o), std::min(inner_step, inner.count - i), multiplier);
        }
      }
    }
    return saturated;
  }

  std::uint64_t convert_tile(Bytes* dst, const Bytes* src, std::int64_t tokens, std::int64_t outer, std::int64_t inner,
                             float multiplier) {
    alignas(64) Bytes from[kTileElements * 4];
    alignas(64) Bytes to[kTileElements * 4];
    const std::int64_t fs = from_size_;
    const std::int64_t ts = to_size_;
    const std::int64_t row = outer * inner;
    const Axis gather[3] = {
        {tokens, token_axis_.src, row * fs}, {outer, outer_axis_.src, inner * fs}, {inner, channel_axis_.src, fs}};
    const Axis scatter[3] = {
        {tokens, row * ts, token_axis_.dst}, {outer, inner * ts, outer_axis_.dst}, {inner, ts, channel_axis_.dst}};
    const Axis whole[1] = {{tokens * row, fs, ts}};
    MovePlan(gather, 3, static_cast<int>(fs)).run(kernels_, from, src);
    const std::uint64_t saturated =
        ConvertPlan(whole, 1, job_.src.map.dtype, job_.dst.map.dtype).run(kernels_, to, from, multiplier);
    MovePlan(scatter, 3, static_cast<int>(ts)).run(kernels_, dst, to);
    return saturated;
  }

  const RemapJob& job_;
  const Kernels& kernels_;
  const std::int64_t from_size_, to_size_;
  const bool converts_;
  const ChannelSplit split_;
  WireSum sum_;
  std::int64_t wire_token_ = 0;  // bytes of one token of one head in the payload

  std::int64_t plan_tokens_ = -1, plan_heads_ = -1;  // what the plans below are for
  MovePlan move_;
  ConvertPlan runs_;
  bool direct_ = false;
  Axis token_axis_, outer_axis_, channel_axis_;
};

// Rounding to nearest and subnormals kept, whatever the caller's thread has set.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { std::fesetenv(&saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  std::fenv_t saved_;
};

// The work of all jobs on one scale, so that each thread takes one contiguous part of it.
struct Work {
  const RemapJob* jobs;
  std::size_t num_jobs;
  std::uint64_t seed;
  const Kernels* kernels;
  int parts;
  std::int64_t bytes;  // of all jobs
  std::atomic<std::uint64_t> checksum{0};
  std::atomic<std::uint64_t> saturated{0};

  static std::int64_t bytes_of(const RemapJob& job) {
    return job.tokens * job.heads * job.channels * std::max(item_size(job.src.map.dtype), item_size(job.dst.map.dtype));
  }

  void run(int part) noexcept {
    const DefaultRounding rounding;
    const std::int64_t from = bytes / parts * part;
    const std::int64_t to = part + 1 == parts ? bytes : bytes / parts * (part + 1);
    RemapResult result;
    std::int64_t first = 0;
    for (std::size_t i = 0; i < num_jobs; ++i) {
      const RemapJob& job = jobs[i];
      const std::int64_t size = bytes_of(job);
      if (size > 0 && first < to && first + size > from) run_job(job, size, from - first, to - first, result);
      first += size;
    }
    checksum.fetch_add(result.checksum, std::memory_order_relaxed);
    saturated.fetch_add(result.saturated, std::memory_order_relaxed);
  }

  // Bytes [from, to) of the job, cut at tokens, or at heads where there are too few tokens.
  void run_job(const RemapJob& job, std::int64_t size, std::int64_t from, std::int64_t to, RemapResult& result) const {
    JobRunner runner(job, *kernels, seed);
    const bool by_head = job.tokens < 64 * parts && job.heads >= parts;
    const std::int64_t whole = by_head ? job.heads : job.tokens;
    const std::int64_t grain =
        by_head ? 1 : std::min<std::int64_t>(64, std::max<std::int64_t>(1, job.tokens / (4 * parts)));
    const std::int64_t start = cut(from, size, whole, grain);
    const std::int64_t stop = cut(to, size, whole, grain);
    if (start < stop && by_head) runner.run(0, job.tokens, start, stop, result);
    if (start < stop && !by_head) runner.run(start, stop, 0, job.heads, result);
  }

  static std::int64_t cut(std::int64_t at, std::int64_t size, std::int64_t whole, std::int64_t grain) {
    if (at <= 0) return 0;
    if (at >= size) return whole;
    return static_cast<std::int64_t>(static_cast<double>(at) / static_cast<double>(size) * static_cast<double>(whole)) /
           grain * grain;
  }
};

// Payload parts whose tokens are not whole words are summed once all of the job has been moved.
std::uint64_t sum_whole(const RemapJob& job, const Kernels& kernels, std::uint64_t seed) {
  const SegmentMap& wire = job.wire == WireSide::kSource ? job.src.map : job.dst.map;
  const std::int64_t bytes = job.tokens * job.heads * job.channels * item_size(wire.dtype);
  return kernels.checksum(pointer(wire.base), bytes, job.wire_offset / 8, seed);
}

}  // namespace

RemapResult remap_cpu(const RemapJob* jobs, std::size_t num_jobs, std::uint64_t seed, int threads) noexcept {
  Work work{jobs, num_jobs, seed, &kernels(), 1, 0};
  for (std::size_t i = 0; i < num_jobs; ++i) work.bytes += Work::bytes_of(jobs[i]);
  const std::int64_t useful = std::max<std::int64_t>(1, work.bytes / kBytesPerThread);
  work.parts = static_cast<int>(std::clamp<std::int64_t>(threads, 1, useful));
  if (work.parts == 1) {
    work.run(0);
  } else {
    parallel(work.parts, [](void* context, int part) noexcept { static_cast<Work*>(context)->run(part); }, &work);
  }
  RemapResult result{work.checksum, work.saturated};
  for (std::size_t i = 0; i < num_jobs; ++i) {
    if (jobs[i].wire != WireSide::kNone && !JobRunner(jobs[i], *work.kernels, seed).sums_in_parts()) {
      result.checksum += sum_whole(jobs[i], *work.kernels, seed);
    }
  }
  return result;
}

}  // namespace hetkv
