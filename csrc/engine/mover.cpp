#include "engine/mover.h"

#include <cstring>

#include "engine/events.h"

namespace hetkv {
namespace {

// The bytes behind a part that ends inside a word: the slot may hold an earlier frame there.
void clear_padding(const RemapJob& job) {
  const SegmentMap& wire = job.dst.map;
  const std::int64_t bytes = job.tokens * job.heads * job.channels * item_size(wire.dtype);
  const std::int64_t tail = bytes % 8;
  if (tail != 0)
    std::memset(reinterpret_cast<void*>(wire.base + static_cast<std::uint64_t>(bytes)), 0,
                static_cast<std::size_t>(8 - tail));
}

}  // namespace

void plan_jobs(const LayerPlan& plan, std::uint64_t start, std::uint64_t stop, std::uint64_t payload, bool pack,
               RemapTask* task) {
  const auto tokens = static_cast<std::int64_t>(stop - start);
  std::uint64_t offset = 0;
  task->jobs.reserve(plan.segments.size());
  for (const auto& segment : plan.segments) {
    RemapSide pool{segment.pool, task->blocks->data(), static_cast<std::int64_t>(start), segment.first_head};
    RemapSide wire{canonical_map(payload + offset, tokens, segment.channels, segment.wire_dtype), nullptr, 0, 0};
    RemapJob job;
    job.src = pack ? pool : wire;
    job.dst = pack ? wire : pool;
    job.tokens = tokens;
    job.heads = plan.heads();
    job.channels = segment.channels;
    job.multipliers = segment.multipliers.empty() ? nullptr : segment.multipliers.data();
    job.wire = pack ? WireSide::kDestination : WireSide::kSource;
    job.wire_offset = offset;
    task->jobs.push_back(job);
    offset = plan.part_end(offset, segment, stop - start);
  }
}

void CpuMover::submit(RemapTask* task) {
  task->start_ns = now_ns();
  for (const RemapJob& job : task->jobs) {
    if (job.wire == WireSide::kDestination) clear_padding(job);
  }
  task->result = remap_cpu(task->jobs.data(), task->jobs.size(), task->seed, threads_);
  task->stop_ns = now_ns();
  task->done = true;
}

}  // namespace hetkv
