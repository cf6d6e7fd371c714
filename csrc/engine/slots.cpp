#include "engine/slots.h"

#include <algorithm>

namespace hetkv::engine {

SlotPool::SlotPool(std::size_t slot_bytes, std::size_t budget_bytes, std::shared_ptr<Device> device, bool isolate)
    : slot_bytes_(slot_bytes),
      isolate_(isolate),
      device_(std::move(device)),
      slots_(std::max<std::size_t>(budget_bytes / slot_bytes, 1)),
      free_(slots_.size()) {}

Status SlotPool::reserve(transport::Transport& transport, Where where) {
  return OwnWindow::make(transport, device_, where, slot_bytes_, &slots_.front().memory);
}

Slot* SlotPool::grant(transport::Transport& transport, std::uint32_t link, Where where, std::uint32_t* id,
                      Status* status) {
  if (free_ == 0) return nullptr;
  // Best is a slot that the link has used before, as it needs no new key on its side; then one whose memory can be
  // used; then one that has none yet.
  const auto usable = [&](const Slot& slot) {
    return slot.memory->where() == where && (slot.link == link || !isolate_);
  };
  const auto merit = [&](const Slot& slot) {
    if (slot.memory == nullptr) return 1;
    if (!usable(slot)) return 0;
    return slot.link == link ? 3 : 2;
  };
  Slot* best = nullptr;
  for (auto& slot : slots_) {
    if (slot.state != SlotState::kFree) continue;
    if (best == nullptr || merit(slot) > merit(*best)) best = &slot;
    if (merit(*best) == 3) break;
  }
  if (best == nullptr) return nullptr;
  if (best->memory != nullptr && !usable(*best)) {
    best->memory.reset();
    ++best->generation;
  }
  if (!best->memory) {
    *status = OwnWindow::make(transport, device_, where, slot_bytes_, &best->memory);
    if (!status->ok()) return nullptr;
  }
  best->state = SlotState::kGranted;
  best->link = link;
  --free_;
  ++held_[link];
  *id = static_cast<std::uint32_t>(best - slots_.data());
  return best;
}

void SlotPool::free(std::uint32_t id) {
  Slot& slot = slots_[id];
  slot.state = SlotState::kFree;
  ++free_;
  drop_holder(slot.link);
}

void SlotPool::drop_holder(std::uint32_t link) {
  const auto found = held_.find(link);
  if (found != held_.end() && --found->second == 0) held_.erase(found);
}

void SlotPool::release() {
  for (auto& slot : slots_) {
    const bool held = slot.state == SlotState::kGranted || slot.state == SlotState::kQuarantined;
    if (held && slot.memory != nullptr) slot.memory->abandon();
    slot.memory.reset();
  }
}

void SlotPool::quarantine(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link != link || slot.state != SlotState::kGranted) continue;
    slot.state = SlotState::kQuarantined;
    ++quarantined_;
    drop_holder(link);
  }
}

void SlotPool::retire(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link == link && slot.state == SlotState::kQuarantined) retire(slot);
  }
}

void SlotPool::retire_host(std::uint32_t link) {
  for (auto& slot : slots_) {
    const bool held = slot.link == link && slot.state == SlotState::kQuarantined;
    if (held && slot.memory->where() == Where::kHost) retire(slot);
  }
}

void SlotPool::retire(Slot& slot) {
  slot.memory.reset();
  ++slot.generation;
  slot.state = SlotState::kFree;
  --quarantined_;
  ++free_;
}

}  // namespace hetkv::engine
