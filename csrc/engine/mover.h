// Runs remaps for an engine: at once on the CPU, asynchronously on a GPU backend. Progress thread only.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "clock.h"
#include "engine/config.h"
#include "engine/device.h"
#include "remap/remap.h"
#include "wire/message.h"

namespace hetkv::engine {

// The block table of one request in one cache group. Shared with the tasks that read it, so that it outlives them.
using BlockTable = std::shared_ptr<const std::vector<std::int32_t>>;

// The packs or unpacks of a bundle's frames. Stays where it is until done.
struct RemapTask {
  void* owner = nullptr;  // of the one who submits it
  std::vector<remap::Job> jobs;
  std::vector<remap::Frame> frames;
  std::vector<BlockTable> tables;  // that the jobs of each frame read
  After after;                     // the caller's work that fills the pool; null where it has ended
  // Where a device copies the payload that the jobs have made, and from where; no bytes: it stays there.
  std::uint64_t copy_to = 0;
  std::uint64_t copy_from = 0;
  std::uint64_t copy_bytes = 0;
  int threads = 0;  // on CPUs; 0: the mover's
  Status status;    // of the device; the results count only where it is ok
  bool done = false;
  std::uint64_t start_ns = 0;
  std::uint64_t stop_ns = 0;

  void reserve(std::size_t num_frames, std::size_t num_jobs);
  void clear();  // as new, but for the memory of its vectors
};

// What a frame of `plan` says of its tokens; no slot, no checksum.
wire::Frame frame_of(const LayerPlan& plan, wire::TokenRange tokens);

// Adds a frame of `plan` to the task, between the pool and a canonical payload at `payload`.
void add_frame(const LayerPlan& plan, BlockTable blocks, const wire::Record& record, std::uint64_t payload, bool pack,
               RemapTask* task);

class Mover {
 public:
  virtual ~Mover() = default;
  virtual void enter() {}  // the progress thread begins
  // The task may be done when this returns; it is never one that `poll` gives then.
  virtual void submit(RemapTask* task) = 0;
  // Appends tasks that have become done.
  virtual void poll(std::vector<RemapTask*>* done) = 0;
  virtual void drain() {}  // waits until no launch is in flight
  // How long the progress thread may sleep while tasks are in flight, as nothing wakes it when they end; 0: any time.
  virtual std::uint32_t nap_us() const { return 0; }
};

class CpuMover final : public Mover {
 public:
  CpuMover(int threads, std::shared_ptr<const Clock> clock) : threads_(threads), clock_(std::move(clock)) {}
  void submit(RemapTask* task) override;
  void poll(std::vector<RemapTask*>*) override {}

 private:
  void copy_payloads(RemapTask& task);

  const int threads_;
  const std::shared_ptr<const Clock> clock_;
  std::vector<std::uint64_t> copies_;  // of payloads that a remap reads twice; as large as the largest task's so far
};

}  // namespace hetkv::engine
