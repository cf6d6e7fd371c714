#include "engine/mover.h"

#include <cstring>
#include <utility>

#include "wire/message.h"

namespace hetkv::engine {
namespace {

constexpr float kOne = 1.0f;  // source of a fill, all strides 0

// The bytes after a part that ends inside a word: the slot may hold an earlier frame there.
void clear_padding(const SegmentMap& wire, std::int64_t elements) {
  const std::int64_t bytes = elements * item_size(wire.dtype);
  const std::int64_t tail = bytes % 8;
  if (tail != 0)
    std::memset(reinterpret_cast<void*>(wire.base + static_cast<std::uint64_t>(bytes)), 0,
                static_cast<std::size_t>(8 - tail));
}

remap::Job fill_job(const LayerPlan& plan, const ScaleFill& fill, std::int64_t start, std::int64_t tokens,
                    const std::int32_t* blocks) {
  remap::Job job;
  job.src.map.base = reinterpret_cast<std::uintptr_t>(&kOne);
  job.src.map.pack = fill.groups;
  job.src.map.dtype = DType::kFloat32;
  job.dst = {fill.pool, blocks, start, fill.first_head};
  job.tokens = tokens;
  job.heads = plan.heads();
  job.channels = fill.groups;
  job.multipliers = fill.values.data();
  return job;
}

}  // namespace

void RemapTask::reserve(std::size_t num_frames, std::size_t num_jobs) {
  frames.reserve(num_frames);
  tables.reserve(num_frames);
  jobs.reserve(num_jobs);
}

void RemapTask::clear() {
  RemapTask fresh;
  fresh.jobs = std::move(jobs);
  fresh.frames = std::move(frames);
  fresh.tables = std::move(tables);
  fresh.jobs.clear();
  fresh.frames.clear();
  fresh.tables.clear();
  *this = std::move(fresh);
}

wire::Frame frame_of(const LayerPlan& plan, wire::TokenRange tokens) {
  wire::Frame frame;
  frame.group = plan.group;
  frame.layer = plan.layer;
  frame.head_start = plan.head_start;
  frame.head_stop = plan.head_stop;
  frame.token_start = tokens.start;
  frame.token_stop = tokens.stop;
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    frame.segments = static_cast<std::uint16_t>(frame.segments | (1u << i));
    frame.dtypes[i] = static_cast<std::uint8_t>(plan.segments[i].wire_dtype);
    frame.channels[i] = static_cast<std::uint32_t>(plan.segments[i].channels);
  }
  frame.scale_encoding = plan.scale_encoding;
  frame.payload_length = plan.payload_bytes(tokens.stop - tokens.start);
  return frame;
}

void add_frame(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t payload, bool pack,
               RemapTask* task) {
  const std::uint64_t start = record.frame.token_start;
  const std::uint64_t stop = record.frame.token_stop;
  const auto tokens = static_cast<std::int64_t>(stop - start);
  const std::size_t before = task->jobs.size();
  std::uint64_t offsets[wire::kMaxSegments + 1] = {};
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    offsets[i + 1] = plan.part_end(offsets[i], plan.segments[i], stop - start);
  }
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    const SegmentPlan& segment = plan.segments[i];
    if (segment.carried) continue;
    const remap::Side pool{segment.pool, blocks->data(), static_cast<std::int64_t>(start), segment.first_head};
    const remap::Side wire{canonical_map(payload + offsets[i], tokens, segment.channels, segment.wire_dtype), nullptr,
                           0, 0};
    remap::Job& job = task->jobs.emplace_back();
    job.src = pack ? pool : wire;
    job.dst = pack ? wire : pool;
    job.tokens = tokens;
    job.heads = plan.heads();
    job.channels = segment.channels;
    job.multipliers = segment.multipliers.empty() ? nullptr : segment.multipliers.data();
    job.wire = pack ? remap::WireSide::kDestination : remap::WireSide::kSource;
    job.wire_offset = offsets[i];
    (pack ? job.src_scales : job.dst_scales) = segment.pool_scales;
    job.joint = segment.joint;
    job.largest = segment.largest;
    if (segment.wire_scales >= 0) {
      const auto at = static_cast<std::size_t>(segment.wire_scales);
      const std::int32_t groups = plan.segments[at].channels;
      remap::Scales& scales = pack ? job.dst_scales : job.src_scales;
      scales.map = canonical_map(payload + offsets[at], tokens, groups, DType::kFloat32);
      scales.channels_per_scale = segment.channels / groups;
      job.wire_scale_offset = offsets[at];
    }
  }
  for (const ScaleFill& fill : plan.fills) {
    task->jobs.push_back(fill_job(plan, fill, static_cast<std::int64_t>(start), tokens, blocks->data()));
  }
  task->frames.push_back(
      {task->jobs.size() - before, wire::checksum_seed(record.request, record.epoch, record.frame), {}});
  task->tables.push_back(std::move(blocks));
}

namespace {

// Calls `visit(map, bytes)` for the parts of its payload that the job reads twice.
template <typename Visit>
void each_read_twice(remap::Job& job, Visit visit) {
  if (!remap::reads_twice(job)) return;
  const std::int64_t rows = job.tokens * job.heads;
  visit(job.src.map, static_cast<std::size_t>(rows * job.channels * item_size(job.src.map.dtype)));
  remap::Scales& scales = job.src_scales;
  if (scales.map.base == 0) return;
  visit(scales.map, static_cast<std::size_t>(rows * (job.channels / scales.channels_per_scale)) * sizeof(float));
}

}  // namespace

// A peer may still write to its slot: what is summed must be what is unpacked. Most remaps see to that themselves.
void CpuMover::copy_payloads(RemapTask& task) {
  std::size_t words = 0;
  for (remap::Job& job : task.jobs) {
    each_read_twice(job, [&](SegmentMap&, std::size_t bytes) { words += (bytes + 7) / 8; });
  }
  if (words > copies_.size()) copies_.resize(words);
  std::uint64_t* to = copies_.data();
  for (remap::Job& job : task.jobs) {
    each_read_twice(job, [&](SegmentMap& map, std::size_t bytes) {
      std::memcpy(to, reinterpret_cast<const void*>(map.base), bytes);
      map.base = reinterpret_cast<std::uint64_t>(to);
      to += (bytes + 7) / 8;
    });
  }
}

void CpuMover::submit(RemapTask* task) {
  task->start_ns = clock_->now_ns();
  copy_payloads(*task);
  for (const remap::Job& job : task->jobs) {
    if (job.wire != remap::WireSide::kDestination) continue;
    const std::int64_t rows = job.tokens * job.heads;
    clear_padding(job.dst.map, rows * job.channels);
    const remap::Scales& scales = job.dst_scales;
    if (scales.map.base != 0) clear_padding(scales.map, rows * (job.channels / scales.channels_per_scale));
  }
  const int threads = task->threads > 0 ? task->threads : threads_;
  remap::remap_frames_cpu(task->jobs.data(), task->frames.data(), task->frames.size(), threads);
  task->stop_ns = clock_->now_ns();
  task->done = true;
}

}  // namespace hetkv::engine
