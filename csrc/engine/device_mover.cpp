#include "engine/device_mover.h"

#include <utility>

#include "engine/frees.h"

namespace hetkv::engine {
namespace {

// Launches of so many bytes read block tables that are new over the bus, instead of after a copy of them.
constexpr std::int64_t kReadOverBus = 256 << 10;
constexpr std::size_t kSlots = 32;  // made at the start; more are made when so many launches are in flight

}  // namespace

struct DeviceMover::Slot {
  explicit Slot(std::shared_ptr<Device> of) : device(std::move(of)) {}
  ~Slot() {
    if (report.results == nullptr) return;
    free_when_no_stream_waits([device = device, report = report]() mutable {
      const CaptureGuard guard(*device);
      static_cast<void>(device->backend().slot_destroy(&report));
    });
  }
  const std::shared_ptr<Device> device;
  HetkvRemapSlot report{};
};

Status DeviceMover::create(std::shared_ptr<Device> device, const EngineConfig& config,
                           std::shared_ptr<const Clock> clock, std::unique_ptr<Mover>* out) {
  const CaptureGuard guard(*device);
  std::unique_ptr<DeviceMover> self(new DeviceMover(device, config, std::move(clock)));
  if (auto status = self->start(); !status.ok()) return status;
  *out = std::move(self);
  return {};
}

DeviceMover::DeviceMover(std::shared_ptr<Device> device, const EngineConfig& config, std::shared_ptr<const Clock> clock)
    : device_(std::move(device)),
      clock_(std::move(clock)),
      max_blocks_(config.max_blocks),
      high_priority_(config.high_priority),
      timed_(config.trace) {}

Status DeviceMover::start() {
  const HetkvBackend& backend = device_->backend();
  for (void** stream : {&ready_, &waiting_, &copying_[0], &copying_[1], &copying_[2]}) {
    if (auto status =
            device_->check(backend.stream_create(device_->index(), high_priority_ ? 1 : 0, stream), "making a stream");
        !status.ok()) {
      return status;
    }
  }
  tables_ = std::make_unique<DeviceTables>(device_, ready_);
  if (auto status = tables_->reserve(); !status.ok()) return status;
  std::vector<Slot*> made(kSlots);
  for (auto& slot : made) {
    if (auto status = take_slot(&slot); !status.ok()) return status;
  }
  free_slots_ = std::move(made);
  return {};
}

DeviceMover::~DeviceMover() {
  const CaptureGuard guard(*device_);
  drain();
  for (auto& line : lines_) line.clear();
  tables_.reset();
  slots_.clear();
  for (void* stream : {ready_, waiting_, copying_[0], copying_[1], copying_[2]}) {
    if (stream != nullptr) static_cast<void>(device_->backend().stream_destroy(stream));
  }
}

// The progress thread never takes part in a capture; and UCX, which calls the driver on it, needs a current device.
void DeviceMover::enter() {
  std::int32_t ignored = 0;
  const HetkvBackend& backend = device_->backend();
  if (device_->can(kHetkvCapRelaxedCapture)) static_cast<void>(backend.exchange_capture_mode(1, &ignored));
  static_cast<void>(backend.bind_thread(device_->index()));
}

void DeviceMover::submit(RemapTask* task) {
  task->start_ns = clock_->now_ns();
  Launch made;
  Status status = launch(*task, &made);
  if (status.ok()) {
    made.task = task;
    lines_[made.line].push_back(std::move(made));
  } else {
    if (made.slot != nullptr) free_slots_.push_back(made.slot);
    end(*task, std::move(status));
  }
}

Status DeviceMover::launch(RemapTask& task, Launch* made) {
  const HetkvBackend& backend = device_->backend();
  Status status;
  void* stream = ready_;
  if (task.after != nullptr && !task.after->happened(&status)) {
    stream = waiting_;
    made->line = 1;
    status = device_->check(backend.stream_wait_event(stream, task.after->handle()), "waiting for the caller's stream");
  }
  if (status.ok()) status = translate(task, stream);
  if (status.ok()) status = take_slot(&made->slot);
  if (status.ok() && timed_) status = device_->record(stream, true, &made->begun);
  if (!status.ok()) return status;
  status = device_->check(
      backend.remap(stream, task.jobs.data(), frames_.data(), frames_.size(), &made->slot->report, max_blocks_),
      "starting a remap");
  if (status.ok()) status = device_->record(stream, timed_, &made->done);
  if (status.ok() && task.copy_bytes > 0) status = copy(task, stream == ready_, made);
  // What was started must have ended before anyone hears of the failure.
  if (!status.ok()) drain();
  return status;
}

// Sends the payload on, after its pack and during the next one.
Status DeviceMover::copy(const RemapTask& task, bool ready, Launch* made) {
  const HetkvBackend& backend = device_->backend();
  const std::size_t which = ready ? turn_++ % 2 : 2;
  void* stream = copying_[which];
  made->line = 2 + which;
  made->packed = made->done;
  auto* to = reinterpret_cast<void*>(task.copy_to);
  const auto* from = reinterpret_cast<const void*>(task.copy_from);
  auto status = device_->check(backend.stream_wait_event(stream, made->packed->handle()), "ordering two streams");
  if (status.ok()) status = device_->check(backend.copy_async(to, from, task.copy_bytes, stream), "copying a payload");
  if (status.ok()) status = device_->record(stream, timed_, &made->done);
  return status;
}

// Puts block tables and multipliers of the task's jobs where the device reads them.
Status DeviceMover::translate(RemapTask& task, void* stream) {
  frames_.clear();
  std::int64_t bytes = 0;
  for (const remap::Job& at : task.jobs) bytes += at.tokens * at.heads * at.channels * item_size(at.src.map.dtype);
  const bool once = bytes <= kReadOverBus;
  remap::Job* job = task.jobs.data();
  for (std::size_t at = 0; at < task.frames.size(); ++at) {
    const remap::Frame& frame = task.frames[at];
    frames_.push_back({frame.seed, frame.num_jobs});
    const std::int32_t* blocks = nullptr;
    if (auto status = tables_->find(task.tables[at], once, &blocks); !status.ok()) return status;
    for (std::size_t i = 0; i < frame.num_jobs; ++i, ++job) {
      for (remap::Side* side : {&job->src, &job->dst}) {
        if (side->blocks != nullptr) side->blocks = blocks;
      }
      if (job->multipliers == nullptr) continue;
      const auto count = static_cast<std::size_t>(job->heads);
      if (auto status = tables_->find(job->multipliers, count, &job->multipliers); !status.ok()) return status;
    }
  }
  return tables_->upload(stream);
}

void DeviceMover::poll(std::vector<RemapTask*>* done) {
  for (auto& line : lines_) {
    Status status;
    while (!line.empty() && line.front().done->happened(&status)) {
      done->push_back(line.front().task);
      finish(line.front(), std::exchange(status, {}));
      line.pop_front();
    }
  }
}

void DeviceMover::finish(Launch& made, Status status) {
  RemapTask& task = *made.task;
  for (std::size_t i = 0; i < task.frames.size(); ++i) {
    const HetkvRemapResult& found = made.slot->report.results[i];
    task.frames[i].result = {found.checksum, found.saturated};
  }
  if (status.ok() && timed_) {  // from when it began on the device, not from when it was put into the stream
    double us = 0;
    const HetkvBackend& backend = device_->backend();
    if (backend.event_elapsed_us(made.begun->handle(), made.done->handle(), &us) == kHetkvOk) {
      task.start_ns = clock_->now_ns() - static_cast<std::uint64_t>(us * 1000);
    }
  }
  free_slots_.push_back(made.slot);
  end(task, std::move(status));
}

void DeviceMover::end(RemapTask& task, Status status) {
  task.status = std::move(status);
  task.stop_ns = clock_->now_ns();
  task.done = true;
}

void DeviceMover::drain() {
  for (void* stream : {ready_, waiting_, copying_[0], copying_[1], copying_[2]}) {
    if (stream != nullptr) static_cast<void>(device_->backend().stream_synchronize(stream));
  }
}

Status DeviceMover::take_slot(Slot** slot) {
  if (!free_slots_.empty()) {
    *slot = free_slots_.back();
    free_slots_.pop_back();
    return {};
  }
  auto made = std::make_unique<Slot>(device_);
  auto status = device_->check(device_->backend().slot_create(device_->index(), &made->report), "making a result slot");
  if (!status.ok()) return status;
  *slot = made.get();
  slots_.push_back(std::move(made));
  return {};
}

}  // namespace hetkv::engine
