// Runs remaps for an engine: at once on the CPU, asynchronously on a GPU backend. Progress thread only.
#pragma once

#include <memory>
#include <vector>

#include "engine/config.h"
#include "engine/device.h"
#include "remap/remap.h"

namespace hetkv::engine {

// The block table of one request in one cache group. Shared with the tasks that read it, so that it outlives them.
using BlockTable = std::shared_ptr<const std::vector<std::int32_t>>;

// One frame's pack or unpack. Stays where it is until done.
struct RemapTask {
  std::vector<remap::Job> jobs;
  BlockTable blocks;
  After after;  // the caller's work that fills the pool; null where it has ended
  std::uint64_t seed = 0;
  // Where a device copies the payload that the jobs have made, and from where; no bytes: it stays there.
  std::uint64_t copy_to = 0;
  std::uint64_t copy_from = 0;
  std::uint64_t copy_bytes = 0;
  remap::Result result;
  Status status;  // of the device; the result counts only where it is ok
  bool done = false;
  std::uint64_t start_ns = 0;
  std::uint64_t stop_ns = 0;
};

// Fills the task's jobs: tokens [start, stop) of `plan` between the pool and a canonical payload at `payload`.
void plan_jobs(const LayerPlan& plan, std::uint64_t start, std::uint64_t stop, std::uint64_t payload, bool pack,
               RemapTask* task);

class Mover {
 public:
  virtual ~Mover() = default;
  virtual void enter() {}  // the progress thread begins
  virtual void submit(RemapTask* task) = 0;
  virtual void poll(RemapTask* task) = 0;  // sets `done`
  virtual void drain() {}                  // waits until no launch is in flight
  // How long the progress thread may sleep while tasks are in flight, as nothing wakes it when they end; 0: any time.
  virtual std::uint32_t nap_us() const { return 0; }
};

class CpuMover final : public Mover {
 public:
  explicit CpuMover(int threads) : threads_(threads) {}
  void submit(RemapTask* task) override;
  void poll(RemapTask*) override {}

 private:
  int threads_;
};

}  // namespace hetkv::engine
