#include "engine/mover.h"

#include "engine/events.h"

namespace hetkv {

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
  task->result = remap_cpu(task->jobs.data(), task->jobs.size(), task->seed, threads_);
  task->stop_ns = now_ns();
  task->done = true;
}

}  // namespace hetkv
