#include "backend/gpu/plan.h"

#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "remap/checksum.h"

namespace hetkv::gpu {
namespace {

constexpr std::int64_t kIndexLimit = std::int64_t{1} << 31;

std::uint32_t floor_log2(std::uint64_t n) {
  std::uint32_t log = 0;
  while (n >> (log + 1) != 0) ++log;
  return log;
}

std::uint32_t ceil_log2(std::uint64_t n) {
  return n <= 1 ? 0 : floor_log2(n - 1) + 1;
}

// All that an address is made of, above one channel's step, is a multiple of `unit` bytes.
bool aligned(const remap::Side& side, std::int64_t channels, std::int64_t unit) {
  const SegmentMap& map = side.map;
  std::uint64_t bits = map.base | static_cast<std::uint64_t>(map.token_stride | map.head_stride);
  if (map.block_size > 0) bits |= static_cast<std::uint64_t>(map.block_stride);
  if (map.pack < channels) bits |= static_cast<std::uint64_t>(map.outer_stride);
  return bits % static_cast<std::uint64_t>(unit) == 0;
}

// One unsigned 32-bit number holds each stride: address.h.
bool strides_fit(const remap::Side& side, std::int64_t channels) {
  const SegmentMap& map = side.map;
  const auto fits = [](std::int64_t stride) { return stride >= 0 && stride <= std::int64_t{UINT32_MAX}; };
  return fits(map.token_stride) && fits(map.head_stride) && fits(map.inner_stride) &&
         (map.block_size == 0 || fits(map.block_stride)) &&
         (map.pack >= channels || fits(map.outer_stride - map.pack * map.inner_stride));
}

// Channels are contiguous in runs of whole `elements`.
bool has_runs(const remap::Side& side, std::int64_t channels, std::int64_t elements) {
  const SegmentMap& map = side.map;
  return map.inner_stride == item_size(map.dtype) && channels % elements == 0 &&
         (map.pack >= channels || map.pack % elements == 0) &&
         aligned(side, channels, std::min<std::int64_t>(16, elements * item_size(map.dtype)));
}

// Groups of tokens are contiguous inside a block.
bool has_token_runs(const remap::Side& side, std::int64_t channels) {
  const SegmentMap& map = side.map;
  const std::int64_t size = item_size(map.dtype);
  remap::Side rest = side;
  rest.map.token_stride = 0;
  const std::int64_t unit = std::min<std::int64_t>(16, kGroup * size);
  return map.block_size > 0 && map.block_size % kGroup == 0 && map.token_stride == size &&
         (map.pack >= channels || map.pack % kGroup == 0) && map.inner_stride % unit == 0 &&
         aligned(rest, channels, unit);
}

// Items of `tile` tokens, the first of which begins `lead` tokens before the job, cross no block's end.
bool is_tiled(const remap::Side& side, std::int64_t tile, std::int64_t lead) {
  return side.map.block_size == 0 || (side.map.block_size % tile == 0 && (side.first_token - lead) % tile == 0);
}

// Whether tokens of an item are in one block: rows and cells.
void plan_items(const remap::Job& from, std::int64_t tile, std::int64_t lead, Job* job) {
  job->src.tiled = is_tiled(from.src, tile, lead);
  job->dst.tiled = is_tiled(from.dst, tile, lead);
}

// What of a side differs from frame to frame.
void place_side(const remap::Side& from, Side* side) {
  const SegmentMap& map = from.map;
  side->base = map.base + static_cast<std::uint64_t>(from.first_head * map.head_stride);
  if (map.block_size > 0) {
    side->blocks = from.blocks;
  } else {
    side->base += static_cast<std::uint64_t>(from.first_token * map.token_stride);
  }
}

void place_scales(const remap::Side& side, const remap::Scales& from, ScaleSide* scales) {
  if (from.map.base == 0) return;
  Side placed;
  remap::Side at = side;
  at.map = from.map;
  place_side(at, &placed);
  scales->base = placed.base;
}

void place_job(const remap::Job& from, Job* job) {
  place_side(from.src, &job->src);
  place_side(from.dst, &job->dst);
  place_scales(from.src, from.src_scales, &job->src_scales);
  place_scales(from.dst, from.dst_scales, &job->dst_scales);
  job->multipliers = from.multipliers;
  job->wire_origin = 1 + from.wire_offset / 8;
  job->scale_origin = 1 + from.wire_scale_offset / 8;
  if (job->path == Path::kWords || job->path == Path::kScaled) return;  // the others count the words from address 0
  const bool source = from.wire == remap::WireSide::kSource;
  job->wire_origin -= (source ? job->src.base : job->dst.base) / 8;
  job->scale_origin -= (source ? job->src_scales.base : job->dst_scales.base) / 8;
}

Side plan_side(const remap::Side& from) {
  const SegmentMap& map = from.map;
  Side side;
  side.block_stride = map.block_stride;
  side.token_stride = map.token_stride;
  side.head_stride = map.head_stride;
  side.inner_stride = map.inner_stride;
  side.pack_step = map.outer_stride - map.pack * map.inner_stride;
  side.pack = FastDiv(static_cast<std::uint32_t>(map.pack));
  side.dtype = map.dtype;
  if (map.block_size > 0) {
    side.first_token = static_cast<std::uint32_t>(from.first_token);
    side.block_size = FastDiv(static_cast<std::uint32_t>(map.block_size));
  }
  return side;
}

// Rows of `elements` to a vector. Where both sides' rows are whole, neighbouring lanes take a row; where one is cut
// into packs, they take a few vectors of several tokens, because there the next token's pack is what comes next in
// memory.
bool plan_rows(const remap::Job& from, Path path, std::int64_t elements, Job* job) {
  const std::int64_t vectors = from.channels / elements;
  std::int64_t lanes = vectors;
  std::uint32_t log_tokens = floor_log2(static_cast<std::uint64_t>(std::max<std::int64_t>(1, 32 / vectors)));
  if (from.src.map.pack < from.channels || from.dst.map.pack < from.channels) {
    lanes = vectors % 4 == 0 ? 4 : vectors % 2 == 0 ? 2 : 1;
    log_tokens = 3;
  }
  log_tokens = std::min({log_tokens, 3u, ceil_log2(static_cast<std::uint64_t>(from.tokens))});
  const std::int64_t tile = std::int64_t{kDepth} << log_tokens;
  const std::int64_t items = (from.tokens + tile - 1) / tile * from.heads * vectors << log_tokens;
  if (items >= kIndexLimit - kThreads) return false;
  job->path = path;
  job->items = static_cast<std::uint32_t>(items);
  job->lane_vectors = FastDiv(static_cast<std::uint32_t>(lanes));
  job->row_parts = FastDiv(static_cast<std::uint32_t>(vectors / lanes));
  job->log_lane_tokens = static_cast<std::uint8_t>(log_tokens);
  job->step_key = job->token_key << log_tokens;
  plan_items(from, tile, 0, job);
  return true;
}

// Cells begin at whole groups of the side whose tokens are contiguous. Neighbouring lanes take as many along the tokens
// as make 64 bytes there, and channels for the rest.
bool plan_cells(const remap::Job& from, bool tokens_first, Job* job) {
  const remap::Side& turned = tokens_first ? from.src : from.dst;
  const std::int64_t lead = turned.first_token % kGroup;
  const std::int64_t groups = std::min<std::int64_t>(4, turned.map.block_size / kGroup);
  const std::uint32_t log_groups = floor_log2(static_cast<std::uint64_t>(groups));
  const std::int64_t tile = std::int64_t{kGroup} << log_groups;
  const std::int64_t vectors = from.channels / kGroup;
  const std::int64_t items = (lead + from.tokens + tile - 1) / tile * from.heads * vectors << log_groups;
  if (items >= kIndexLimit - kThreads) return false;
  job->path = Path::kCells;
  job->items = static_cast<std::uint32_t>(items);
  job->tokens_first = tokens_first;
  job->lead = static_cast<std::uint8_t>(lead);
  job->lane_vectors = FastDiv(static_cast<std::uint32_t>(vectors));
  job->log_lane_tokens = static_cast<std::uint8_t>(log_groups);
  plan_items(from, kGroup, lead, job);
  return true;
}

void plan_words(const remap::Job& from, Job* job) {
  const remap::Side& canonical = from.wire == remap::WireSide::kSource ? from.src : from.dst;
  job->path = Path::kWords;
  job->elements = static_cast<std::uint64_t>(from.tokens) * static_cast<std::uint64_t>(from.heads) *
                  static_cast<std::uint64_t>(from.channels);
  job->wide = job->elements >= static_cast<std::uint64_t>(kIndexLimit);
  job->whole_words = from.wire == remap::WireSide::kDestination && canonical.map.base % 8 == 0;
}

// Codes, or scales, that are as on the wire, in whole words.
bool is_flat(const remap::Job& job, const SegmentMap& map, std::int32_t channels) {
  const SegmentMap flat = canonical_map(map.base, job.tokens, channels, map.dtype);
  return map.block_size == 0 && map.base % 8 == 0 && map.token_stride == flat.token_stride &&
         map.head_stride == flat.head_stride && map.inner_stride == flat.inner_stride && map.pack >= channels;
}

ScaleSide plan_scales(const remap::Scales& from) {
  ScaleSide side;
  if (from.map.base == 0) return side;  // then all else says nothing
  side.block_stride = from.map.block_stride;
  side.token_stride = from.map.token_stride;
  side.head_stride = from.map.head_stride;
  side.group_stride = from.map.inner_stride;
  side.channels = static_cast<std::uint32_t>(from.channels_per_scale);
  return side;
}

// Groups of whole vectors that a cluster takes, whose scales are on the wire's side, of values on the other one.
bool plan_groups(const remap::Job& from, Job* job) {
  const bool quantises = from.dst_scales.map.base != 0;
  if (quantises == (from.src_scales.map.base != 0) || (from.joint && from.heads > 1)) return false;
  const remap::Side& coded = quantises ? from.dst : from.src;
  const remap::Side& plain = quantises ? from.src : from.dst;
  const remap::Scales& scales = quantises ? from.dst_scales : from.src_scales;
  const std::int32_t channels = scales.channels_per_scale;
  const DType code = coded.map.dtype, value = plain.map.dtype;
  if ((code != DType::kInt8 && code != DType::kFloat8E4M3FN) || item_size(value) == 1) return false;
  if (channels % std::int32_t{kGroup} != 0 || channels > std::int32_t{kGroup * kMaxCluster}) return false;
  if (!is_flat(from, coded.map, from.channels) || !is_flat(from, scales.map, from.channels / channels)) return false;
  if (quantises && (from.wire != remap::WireSide::kDestination || from.largest > largest_scaled(code))) return false;
  job->runs = has_runs(plain, from.channels, kGroup);
  if (!strides_fit(plain, from.channels)) return false;
  if (!quantises && from.wire == remap::WireSide::kDestination && !job->runs) return false;
  const std::uint32_t log_cluster = ceil_log2(static_cast<std::uint64_t>(channels) / kGroup);
  const std::int64_t items = (std::int64_t{job->groups} + kDepth - 1) / kDepth << log_cluster;
  if (items >= kIndexLimit - kThreads) return false;
  job->path = quantises ? Path::kQuantise : Path::kApply;
  job->items = static_cast<std::uint32_t>(items);
  job->log_cluster = static_cast<std::uint8_t>(log_cluster);
  return true;
}

// A job with scales on either side.
void plan_scaled(const remap::Job& from, Job* job) {
  job->src_scales = plan_scales(from.src_scales);
  job->dst_scales = plan_scales(from.dst_scales);
  job->largest = from.largest > 0 ? from.largest : largest_scaled(from.dst.map.dtype);
  job->joint = from.joint;
  job->group_channels = std::max(job->src_scales.channels, job->dst_scales.channels);
  job->row_groups = FastDiv(static_cast<std::uint32_t>(from.channels) / job->group_channels);
  job->groups = static_cast<std::uint32_t>(from.tokens * from.heads * std::int64_t{job->row_groups.divisor});
  if (plan_groups(from, job)) return;
  job->path = Path::kScaled;
  job->items = (job->groups + kScaledUnits - 1) / kScaledUnits;
}

// All but what place_job() sets.
void plan_job(const remap::Job& from, Job* job) {
  job->src = plan_side(from.src);
  job->dst = plan_side(from.dst);
  job->converts = from.src.map.dtype != from.dst.map.dtype || from.multipliers != nullptr;
  job->wire = from.wire;
  job->tokens = static_cast<std::uint32_t>(from.tokens);
  job->token_count = FastDiv(static_cast<std::uint32_t>(std::max<std::int64_t>(1, from.tokens)));
  job->heads = FastDiv(static_cast<std::uint32_t>(std::max(1, from.heads)));
  job->channels = FastDiv(static_cast<std::uint32_t>(std::max(1, from.channels)));
  job->path = Path::kMove16;  // with nothing to move: of the smallest kernel
  if (from.tokens == 0 || from.heads == 0 || from.channels == 0) return;
  if (from.scaled()) return plan_scaled(from, job);

  const std::int64_t size = item_size(from.src.map.dtype);
  const SegmentMap& wire = from.wire == remap::WireSide::kSource ? from.src.map : from.dst.map;
  const std::int64_t token_bytes = from.channels * item_size(wire.dtype);
  const bool sums = from.wire == remap::WireSide::kNone || token_bytes % 8 == 0;
  const bool fits = strides_fit(from.src, from.channels) && strides_fit(from.dst, from.channels);
  if (from.wire != remap::WireSide::kNone)
    job->token_key = static_cast<std::uint64_t>(token_bytes / 8) * remap::kChecksumStep;

  const auto rows = [&](std::int64_t elements) {
    return sums && fits && has_runs(from.src, from.channels, elements) && has_runs(from.dst, from.channels, elements);
  };
  if (!job->converts && rows(16 / size) && plan_rows(from, Path::kMove16, 16 / size, job)) return;
  if (!job->converts && rows(8 / size) && plan_rows(from, Path::kMove8, 8 / size, job)) return;
  if (job->converts && rows(kGroup) && plan_rows(from, Path::kConvert, kGroup, job)) return;
  for (const bool tokens_first : {true, false}) {
    const remap::Side& turned = tokens_first ? from.src : from.dst;
    const remap::Side& other = tokens_first ? from.dst : from.src;
    if (sums && fits && has_token_runs(turned, from.channels) && has_runs(other, from.channels, kGroup) &&
        plan_cells(from, tokens_first, job)) {
      return;
    }
  }
  plan_words(from, job);
}

std::uint32_t chunks_of(const Job& job) {
  if (job.path != Path::kWords) return (job.items + kThreads - 1) / kThreads;
  const DType dtype = job.wire == remap::WireSide::kSource ? job.src.dtype : job.dst.dtype;
  const std::uint64_t elements = std::uint64_t{kThreads} * kDepth * 8 / static_cast<std::uint64_t>(item_size(dtype));
  return static_cast<std::uint32_t>((job.elements + elements - 1) / elements);
}

// Their plans are alike: all that a plan looks at is the same, alignment too.
bool alike(const remap::Side& a, const remap::Side& b) {
  const SegmentMap& x = a.map;
  const SegmentMap& y = b.map;
  return x.block_stride == y.block_stride && x.token_stride == y.token_stride && x.head_stride == y.head_stride &&
         x.outer_stride == y.outer_stride && x.inner_stride == y.inner_stride && x.block_size == y.block_size &&
         x.pack == y.pack && x.dtype == y.dtype && (x.base ^ y.base) % 16 == 0 && a.first_token == b.first_token &&
         a.first_head == b.first_head;
}

bool alike(const remap::Scales& a, const remap::Scales& b) {
  const SegmentMap& x = a.map;
  const SegmentMap& y = b.map;
  return (x.base == 0) == (y.base == 0) && a.channels_per_scale == b.channels_per_scale &&
         x.block_stride == y.block_stride && x.token_stride == y.token_stride && x.head_stride == y.head_stride &&
         x.inner_stride == y.inner_stride && x.block_size == y.block_size && x.pack == y.pack &&
         (x.base ^ y.base) % 8 == 0;
}

bool alike(const remap::Job& a, const remap::Job& b) {
  return alike(a.src_scales, b.src_scales) && alike(a.dst_scales, b.dst_scales) && a.joint == b.joint &&
         a.largest == b.largest && a.tokens == b.tokens && a.heads == b.heads && a.channels == b.channels &&
         a.wire == b.wire && (a.multipliers == nullptr) == (b.multipliers == nullptr) && alike(a.src, b.src) &&
         alike(a.dst, b.dst);
}

}  // namespace

bool can_plan(const remap::Job& job) {
  constexpr std::int64_t limit = kIndexLimit / 2;
  if (job.tokens >= limit || job.src.first_token >= limit || job.dst.first_token >= limit) return false;
  // Groups of jobs with scales are counted in 32 bits.
  return !job.scaled() || job.tokens * job.heads * job.channels < kIndexLimit;
}

std::uint32_t plan_jobs(const remap::Job* jobs, const HetkvRemapFrame* frames, std::size_t num_frames, Job* out,
                        std::uint32_t* first_chunk) {
  const Job* first = out;
  std::uint32_t chunks = 0;
  for (std::size_t frame = 0; frame < num_frames; ++frame) {
    for (std::uint64_t i = 0; i < frames[frame].num_jobs; ++i, ++jobs, ++out, ++first_chunk) {
      // K and V, and the same layer of several requests, differ in where they are and in nothing else.
      if (out != first && alike(jobs[0], jobs[-1])) {
        *out = out[-1];
      } else {
        *out = Job{};
        plan_job(*jobs, out);
      }
      place_job(*jobs, out);
      out->seed = frames[frame].seed;
      out->frame = static_cast<std::uint32_t>(frame);
      *first_chunk = chunks;
      chunks += chunks_of(*out);
    }
  }
  return chunks;
}

}  // namespace hetkv::gpu
