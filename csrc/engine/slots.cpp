#include "engine/slots.h"

#include <algorithm>

namespace hetkv {

SlotPool::SlotPool(std::size_t slot_bytes, std::size_t budget_bytes)
    : slot_bytes_(slot_bytes), slots_(std::max<std::size_t>(budget_bytes / slot_bytes, 1)), free_(slots_.size()) {}

Slot* SlotPool::lend(ucx::Worker& worker, std::uint32_t link, std::uint32_t* id, Status* status) {
  // A slot that the link has used before needs no new key on its side.
  Slot* best = nullptr;
  if (free_ == 0) return nullptr;
  for (auto& slot : slots_) {
    if (slot.state != SlotState::kFree) continue;
    if (best == nullptr || (slot.memory && slot.link == link) || (slot.memory && !best->memory)) best = &slot;
    if (best->memory && best->link == link) break;
  }
  if (best == nullptr) return nullptr;
  if (!best->memory) {
    *status = ucx::Memory::allocate(worker, slot_bytes_, &best->memory);
    if (!status->ok()) return nullptr;
  }
  best->state = SlotState::kLent;
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

void SlotPool::quarantine(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link != link || slot.state != SlotState::kLent) continue;
    slot.state = SlotState::kQuarantined;
    ++quarantined_;
    drop_holder(link);
  }
}

void SlotPool::retire(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link != link || slot.state != SlotState::kQuarantined) continue;
    slot.memory.reset();
    ++slot.generation;
    slot.state = SlotState::kFree;
    --quarantined_;
    ++free_;
  }
}

}  // namespace hetkv
