#include "engine/slots.h"

#include <algorithm>

namespace hetkv {

SlotPool::SlotPool(std::size_t slot_bytes, std::size_t budget_bytes)
    : slot_bytes_(slot_bytes), slots_(std::max<std::size_t>(budget_bytes / slot_bytes, 1)) {}

std::size_t SlotPool::quarantined() const {
  return static_cast<std::size_t>(
      std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.state == SlotState::kQuarantined; }));
}

std::size_t SlotPool::held_by(std::uint32_t link) const {
  return static_cast<std::size_t>(std::count_if(slots_.begin(), slots_.end(), [link](const Slot& slot) {
    return slot.link == link && (slot.state == SlotState::kLent || slot.state == SlotState::kFilled);
  }));
}

Slot* SlotPool::lend(ucx::Worker& worker, std::uint32_t link, std::uint32_t* id, Status* status) {
  // A slot that the link has used before needs no new key on its side.
  Slot* best = nullptr;
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
  *id = static_cast<std::uint32_t>(best - slots_.data());
  return best;
}

void SlotPool::quarantine(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link == link && slot.state == SlotState::kLent) slot.state = SlotState::kQuarantined;
  }
}

void SlotPool::retire(std::uint32_t link) {
  for (auto& slot : slots_) {
    if (slot.link != link || slot.state != SlotState::kQuarantined) continue;
    slot.memory.reset();
    ++slot.generation;
    slot.state = SlotState::kFree;
  }
}

}  // namespace hetkv
