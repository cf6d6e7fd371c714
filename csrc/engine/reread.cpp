#include "engine/reread.h"

#include <algorithm>
#include <cstddef>
#include <utility>

namespace hetkv::engine {
namespace {

constexpr std::uint64_t aligned(std::uint64_t bytes) {
  return (bytes + 7) / 8 * 8;
}

// Canonical parts of scratch memory, one after the other.
class Scratch {
 public:
  explicit Scratch(std::uint64_t base) : base_(base) {}

  std::uint64_t at() const { return at_; }
  SegmentMap take(const remap::Job& job, std::int32_t channels, DType dtype) {
    const SegmentMap map = canonical_map(base_ + at_, job.tokens, channels, dtype);
    at_ += aligned(static_cast<std::uint64_t>(job.tokens * job.heads * channels * item_size(dtype)));
    return map;
  }

 private:
  const std::uint64_t base_;
  std::uint64_t at_ = 0;
};

// A frame of the unpack's jobs, each with scratch in place of the pool; `from_pool`: with the pool in place of the
// payload, so that nothing is converted any more.
void add_stored(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t payload,
                std::uint64_t base, bool from_pool, RemapTask* task) {
  RemapTask unpack;
  add_frame(plan, blocks, record, payload, false, &unpack);
  const std::size_t before = task->jobs.size();
  Scratch scratch(base);
  for (const remap::Job& job : unpack.jobs) {
    remap::Job next;
    if (from_pool) {
      next.src = job.dst;
      next.tokens = job.tokens;
      next.heads = job.heads;
      next.channels = job.channels;
    } else {
      next = job;
    }
    next.wire = remap::WireSide::kDestination;
    next.wire_offset = scratch.at();
    next.dst = {scratch.take(job, job.channels, job.dst.map.dtype), nullptr, 0, 0};
    if (job.dst_scales.map.base == 0) {
      task->jobs.push_back(next);
      continue;
    }
    const std::uint64_t offset = scratch.at();
    const std::int32_t groups = job.channels / job.dst_scales.channels_per_scale;
    const SegmentMap scales = scratch.take(job, groups, DType::kFloat32);
    if (!from_pool) {
      next.dst_scales.map = scales;
      next.wire_scale_offset = offset;
      task->jobs.push_back(next);
      continue;
    }
    task->jobs.push_back(next);
    next.src.map = job.dst_scales.map;
    next.channels = groups;
    next.dst.map = scales;
    next.wire_offset = offset;
    task->jobs.push_back(next);
  }
  task->frames.push_back(
      {task->jobs.size() - before, wire::checksum_seed(record.request, record.epoch, record.frame), {}});
  task->tables.push_back(std::move(blocks));
}

}  // namespace

bool unpacks_exactly(const LayerPlan& plan) {
  return plan.fills.empty() && std::all_of(plan.segments.begin(), plan.segments.end(), [](const SegmentPlan& segment) {
           return segment.pool.dtype == segment.wire_dtype && segment.multipliers.empty() &&
                  segment.pool_scales.map.base == 0 && segment.wire_scales < 0;
         });
}

std::uint64_t reread_bytes(const LayerPlan& plan, std::uint64_t tokens) {
  const std::uint64_t rows = static_cast<std::uint64_t>(plan.heads()) * tokens;
  const auto part = [&](std::int32_t channels, DType dtype) {
    return aligned(rows * static_cast<std::uint64_t>(channels) * static_cast<std::uint64_t>(item_size(dtype)));
  };
  std::uint64_t bytes = 0;
  for (const SegmentPlan& segment : plan.segments) {
    if (segment.carried) continue;
    bytes += part(segment.channels, segment.pool.dtype);
    const remap::Scales& scales = segment.pool_scales;
    if (scales.map.base != 0) bytes += part(segment.channels / scales.channels_per_scale, DType::kFloat32);
  }
  for (const ScaleFill& fill : plan.fills) bytes += part(fill.groups, DType::kFloat32);
  return bytes;
}

void add_reread(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t scratch,
                RemapTask* task) {
  if (unpacks_exactly(plan)) return add_frame(plan, std::move(blocks), record, scratch, true, task);
  add_stored(plan, std::move(blocks), record, 0, scratch, true, task);
}

void add_expected(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t payload,
                  std::uint64_t scratch, RemapTask* task) {
  add_stored(plan, std::move(blocks), record, payload, scratch, false, task);
}

}  // namespace hetkv::engine
