// Runs remaps on a device: one launch a task on side streams, after the caller's event, and no wait on the host. Any
// number may be in flight; those whose event has happened run back to back. Tasks of one stream end in its order, so
// that one query a stream tells which have.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "engine/device_tables.h"
#include "engine/mover.h"

namespace hetkv::engine {

class DeviceMover final : public Mover {
 public:
  // Of the configuration: `max_blocks`, `high_priority`, and `trace`, with which tasks get the device's own times.
  static Status create(std::shared_ptr<Device> device, const EngineConfig& config, std::shared_ptr<const Clock> clock,
                       std::unique_ptr<Mover>* out);
  ~DeviceMover() override;

  void enter() override;
  void submit(RemapTask* task) override;
  void poll(std::vector<RemapTask*>* done) override;
  void drain() override;
  std::uint32_t nap_us() const override { return 50; }

 private:
  struct Slot;
  struct Launch {
    RemapTask* task = nullptr;
    Slot* slot = nullptr;
    std::size_t line = 0;  // where it ends
    After begun;           // where times are asked for
    After packed;          // where a copy follows
    After done;
  };
  DeviceMover(std::shared_ptr<Device> device, const EngineConfig& config, std::shared_ptr<const Clock> clock);
  Status start();
  Status launch(RemapTask& task, Launch* launch);
  Status copy(const RemapTask& task, bool ready, Launch* made);
  Status translate(RemapTask& task, void* stream);
  Status take_slot(Slot** slot);
  void finish(Launch& made, Status status);
  void end(RemapTask& task, Status status);

  const std::shared_ptr<Device> device_;
  const std::shared_ptr<const Clock> clock_;
  const int max_blocks_;
  const bool high_priority_;
  const bool timed_;
  void* ready_ = nullptr;    // for tasks whose event has happened, and for uploads
  void* waiting_ = nullptr;  // for the others: what waits in it holds nobody else up
  // For payloads that go on by the copy engine, during the next pack: in turn after packs of `ready_`, so that one
  // copy begins while the one before it ends, and after those of `waiting_`.
  std::array<void*, 3> copying_{};
  std::size_t turn_ = 0;
  std::unique_ptr<DeviceTables> tables_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_slots_;
  std::vector<HetkvRemapFrame> frames_;      // of the launch being made
  std::array<std::deque<Launch>, 5> lines_;  // in flight, by the stream in which they end
};

}  // namespace hetkv::engine
