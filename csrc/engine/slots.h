// The receiver's window: slots of registered memory out of one byte budget, granted to links. Each slot is an
// allocation of its own, so that one that a silent peer may still write to can be replaced alone. Progress thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/windows.h"

namespace hetkv::engine {

enum class SlotState : std::uint8_t {
  kFree,
  kGranted,      // the sender's, until it commits or releases it
  kFilled,       // committed: being unpacked
  kQuarantined,  // granted to a link that was lost; counts against the budget until nothing of the peer's can arrive
};

struct Slot {
  std::uint32_t generation = 0;
  SlotState state = SlotState::kFree;
  std::uint32_t link = 0;             // of whom it is granted to, or filled or quarantined by
  std::unique_ptr<OwnWindow> memory;  // made when the slot is first granted
};

class SlotPool {
 public:
  // `device`: the pool's, or null. `isolate`: no two links ever have the same memory.
  SlotPool(std::size_t slot_bytes, std::size_t budget_bytes, std::shared_ptr<Device> device, bool isolate);

  // Makes the memory of one slot now, so that a lack of it shows at the start.
  Status reserve(transport::Transport& transport, Where where);

  std::size_t size() const { return slots_.size(); }
  std::size_t free_slots() const { return free_; }
  std::size_t quarantined() const { return quarantined_; }
  std::size_t in_use() const { return slots_.size() - free_ - quarantined_; }              // granted or filled
  const std::unordered_map<std::uint32_t, std::size_t>& holders() const { return held_; }  // by link: granted or filled
  std::size_t held_by(std::uint32_t link) const {                                          // granted or filled
    const auto found = held_.find(link);
    return found == held_.end() ? 0 : found->second;
  }
  Slot* at(std::uint32_t id) { return id < slots_.size() ? &slots_[id] : nullptr; }

  // A free slot in that kind of memory, now granted to the link, or null where none is free (or memory ran out:
  // `status`).
  Slot* grant(transport::Transport& transport, std::uint32_t link, Where where, std::uint32_t* id, Status* status);
  void free(std::uint32_t id);  // of a slot that is granted or filled
  // The slots that the link holds and has not committed may still be written to.
  void quarantine(std::uint32_t link);
  // Frees all memory; nothing is granted afterwards. What a sender may still store into is left to it
  // (OwnWindow::abandon).
  void release();
  // The peer is gone: its quarantined slots get new memory and a new generation when they are granted again.
  void retire(std::uint32_t link);
  // The link's endpoint is closed: what it put or sent cannot arrive any more. The same for slots in host memory, as
  // what a stopped peer still stores goes to pages that only its own mapping keeps. Memory of a device, which must not
  // be freed while a peer maps it, stays in quarantine.
  void retire_host(std::uint32_t link);

 private:
  friend struct Inspect;  // of tests/sim
  void drop_holder(std::uint32_t link);
  void retire(Slot& slot);

  const std::size_t slot_bytes_;
  const bool isolate_;
  const std::shared_ptr<Device> device_;
  std::vector<Slot> slots_;
  std::size_t free_;
  std::size_t quarantined_ = 0;
  std::unordered_map<std::uint32_t, std::size_t> held_;
};

}  // namespace hetkv::engine
