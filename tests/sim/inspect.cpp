#include "inspect.h"

#include <map>

namespace hetkv::engine {
namespace {

// Collects the first thing that is not as it must be.
class Findings {
 public:
  template <typename A, typename B>
  void equal(const A& a, const B& b, const char* what) {
    if (static_cast<std::uint64_t>(a) == static_cast<std::uint64_t>(b)) return;
    add(std::string(what) + ": " + std::to_string(a) + ", but found " + std::to_string(b));
  }
  void require(bool holds, const char* what) {
    if (!holds) add(what);
  }
  const std::string& text() const { return text_; }

 private:
  void add(std::string text) {
    if (text_.empty()) text_ = std::move(text);
  }
  std::string text_;
};

}  // namespace

std::string Inspect::check(const Sender& sender) {
  Findings found;
  std::map<const Link*, std::size_t> open;
  std::map<const Link*, std::size_t> in_flight;
  std::map<const Link*, std::multiset<std::uint32_t>> bundled;
  std::map<const Lane*, std::uint32_t> frames;
  std::map<const SendRequest*, std::uint32_t> packing;
  std::size_t staged[2] = {};
  for (const auto& bundle : sender.bundles_) {
    if (!bundle->ahead) ++in_flight[bundle->link.get()];
    bundled[bundle->link.get()].insert(bundle->slot);
    if (bundle->staging != nullptr && !bundle->slow) ++staged[static_cast<int>(bundle->staging->where())];
    for (const auto& piece : bundle->pieces) {
      ++frames[piece.lane];
      if (!bundle->task.done) ++packing[piece.lane->request];
    }
  }
  for (const auto& [handle, request] : sender.requests_) {
    found.equal(request.packing, packing[&request], "a request's packs in flight");
    const auto named = sender.handles_.find(request.id);
    found.require(named != sender.handles_.end() && named->second == handle, "a request is not found by its id");
    for (const auto& lane : request.lanes) {
      found.equal(lane.in_flight, frames[&lane], "a lane's frames in flight");
      found.require(lane.unsent <= lane.remaining, "a lane has more to cut than to pack");
      if (!lane.cancelled && lane.remaining > 0) ++open[lane.link.get()];
      const bool going = request.failure.ok() && !lane.cancelled && !lane.delivered;
      found.require(!going || lane.link->up(), "a request goes on over a link that is lost");
      found.require(!(lane.cancelled && lane.place != Lane::Place::kNone), "a cancelled lane is queued");
    }
  }
  found.equal(sender.handles_.size(), sender.requests_.size(), "ids of requests");
  std::map<std::uint32_t, std::size_t> tickets;
  for (const auto& [id, ticket] : sender.pending_) ++tickets[ticket.link->id];
  for (const auto& [id, windows] : sender.windows_) {
    found.equal(windows.tickets, tickets[id], "a link's tickets that wait");
    const auto link = sender.links_.find(id);
    if (link == sender.links_.end()) continue;
    found.equal(windows.open, open[link->second.get()], "a link's lanes that have something left");
    found.equal(windows.in_flight, in_flight[link->second.get()], "a link's bundles in flight");
    auto slots = bundled[link->second.get()];
    slots.insert(windows.free.begin(), windows.free.end());
    if (!link->second->up()) continue;
    std::size_t granted = 0;
    for (const auto& [slot, window] : windows.slots) {
      found.equal(slots.count(slot), window.granted ? 1 : 0, "a granted slot is free or in a bundle, once");
      if (window.granted) ++granted;
    }
    found.equal(slots.size(), granted, "slots that are used and granted");
  }

  for (int where = 0; where < 2; ++where) {
    found.equal(sender.staging_made_[where], sender.staging_[where].size() + staged[where], "staging buffers");
  }
  return found.text();
}

std::string Inspect::check(const Receiver& receiver) {
  Findings found;
  std::map<std::uint32_t, std::size_t> held;
  std::size_t free = 0;
  std::size_t quarantined = 0;
  std::size_t filled = 0;
  for (const Slot& slot : receiver.slots_.slots_) {
    const auto link = receiver.links_.find(slot.link);
    const bool up = link != receiver.links_.end() && link->second->up();
    switch (slot.state) {
      case SlotState::kFree:
        ++free;
        break;
      case SlotState::kQuarantined:
        ++quarantined;
        found.require(!up, "a slot is in quarantine for a link that is up");
        break;
      case SlotState::kFilled:
        ++filled;
        ++held[slot.link];
        break;
      case SlotState::kGranted:
        ++held[slot.link];
        found.require(up, "a slot is granted to a link that is lost");
    }
  }
  found.equal(receiver.slots_.free_, free, "free slots");
  found.equal(receiver.slots_.quarantined_, quarantined, "slots in quarantine");
  for (const auto& unpack : receiver.unpacks_) {
    const bool kept = !unpack->holds_slot || receiver.slots_.slots_[unpack->slot].state == SlotState::kFilled;
    found.require(kept, "a slot is given away before its unpack has ended");
  }
  const auto holding = std::count_if(receiver.unpacks_.begin(), receiver.unpacks_.end(),
                                     [](const auto& unpack) { return unpack->holds_slot; });
  found.equal(static_cast<std::size_t>(holding), filled, "slots that are being unpacked");
  for (const auto& [link, count] : receiver.slots_.held_) found.equal(count, held[link], "slots of a link");
  std::map<std::uint32_t, std::size_t> open;
  std::map<const Receiver::Request*, std::uint32_t> unpacking;
  for (const auto& unpack : receiver.unpacks_) {
    for (const auto& piece : unpack->pieces) ++unpacking[piece.request];
  }
  for (const auto& [handle, request] : receiver.requests_) {
    found.equal(request.unpacking, unpacking[&request], "a request's unpacks in flight");
    const bool due = receiver.deadlines_.count({request.deadline_ns, handle}) != 0;
    found.require(due || !request.failure.ok(), "a request has no deadline");
    for (const auto& part : request.parts) {
      if (!request.failure.ok() || part.remaining == 0) continue;
      ++open[part.link->id];
      found.require(part.link->up(), "a request goes on over a link that is lost");
    }
  }
  for (const auto& [link, demand] : receiver.demands_) {
    if (receiver.links_.count(link) != 0) found.equal(demand.open, open[link], "a link's parts that are open");
  }
  return found.text();
}

std::string Inspect::at_rest(const Sender& sender) {
  Findings found;
  found.equal(sender.requests_.size(), 0, "requests of a sender at rest");
  found.equal(sender.pending_.size(), 0, "tickets of a sender at rest");
  found.equal(sender.bundles_.size(), 0, "bundles of a sender at rest");
  found.equal(sender.deadlines_.size(), 0, "deadlines of a sender at rest");
  found.equal(sender.failed_.size(), 0, "failed requests of a sender at rest");
  for (const auto& [id, windows] : sender.windows_) found.equal(windows.free.size(), 0, "slots of a sender at rest");
  for (const auto& [id, link] : sender.links_) found.require(link->up(), "a link of a sender at rest is not up");
  return found.text();
}

std::string Inspect::at_rest(const Receiver& receiver) {
  Findings found;
  found.equal(receiver.requests_.size(), 0, "requests of a receiver at rest");
  found.equal(receiver.unpacks_.size(), 0, "unpacks of a receiver at rest");
  found.equal(receiver.deadlines_.size(), 0, "deadlines of a receiver at rest");
  found.equal(receiver.slots_.in_use(), 0, "slots of a receiver at rest that are granted");
  found.equal(receiver.slots_.quarantined(), 0, "slots of a receiver at rest that are in quarantine");
  for (const auto& [id, link] : receiver.links_) found.require(link->up(), "a link of a receiver at rest is not up");
  return found.text();
}

std::set<std::pair<std::uint32_t, std::uint32_t>> Inspect::held(const Sender& sender, std::uint32_t link) {
  std::set<std::pair<std::uint32_t, std::uint32_t>> out;
  const auto windows = sender.windows_.find(link);
  if (windows == sender.windows_.end()) return out;
  for (const auto& [slot, window] : windows->second.slots) {
    if (window.granted) out.emplace(slot, window.generation);
  }
  return out;
}

std::set<std::pair<std::uint32_t, std::uint32_t>> Inspect::granted(const Receiver& receiver, std::uint32_t link) {
  std::set<std::pair<std::uint32_t, std::uint32_t>> out;
  for (std::size_t i = 0; i < receiver.slots_.slots_.size(); ++i) {
    const Slot& slot = receiver.slots_.slots_[i];
    if (slot.state == SlotState::kGranted && slot.link == link) {
      out.emplace(static_cast<std::uint32_t>(i), slot.generation);
    }
  }
  return out;
}

bool Inspect::idle(const Sender& sender, std::uint32_t link) {
  const auto windows = sender.windows_.find(link);
  if (windows == sender.windows_.end()) return false;
  return !windows->second.free.empty() && windows->second.ready.empty() && windows->second.ahead.empty();
}

bool Inspect::over_share(const Receiver& receiver, std::uint32_t link) {
  const SlotPool& slots = receiver.slots_;
  const auto& wanting = receiver.wanting_;
  if (wanting.empty() || std::get<0>(*wanting.begin()) > 0 || slots.free_slots() > 0) return false;
  std::size_t contenders = wanting.size();
  for (const auto& [holder, held] : slots.holders()) contenders += receiver.demands_.at(holder).ranked ? 0 : 1;
  return slots.held_by(link) * contenders > slots.size() - slots.quarantined();
}

std::optional<std::uint32_t> Inspect::writer(const Receiver& receiver, std::uint64_t address) {
  const Slot* slot = at(receiver, address);
  if (slot == nullptr) return std::nullopt;
  const bool open = slot->state == SlotState::kGranted || slot->state == SlotState::kQuarantined;
  return open ? slot->link : 0;
}

std::uint32_t Inspect::user(const Receiver& receiver, std::uint64_t address) {
  const Slot* slot = at(receiver, address);
  const bool used = slot != nullptr && (slot->state == SlotState::kGranted || slot->state == SlotState::kFilled);
  return used ? slot->link : 0;
}

const Slot* Inspect::at(const Receiver& receiver, std::uint64_t address) {
  for (const Slot& slot : receiver.slots_.slots_) {
    if (slot.memory == nullptr || address < slot.memory->local()) continue;
    if (address - slot.memory->local() < slot.memory->bytes()) return &slot;
  }
  return nullptr;
}

void Inspect::flip(Receiver& receiver, std::uint64_t random) {
  std::vector<Slot*> used;
  for (Slot& slot : receiver.slots_.slots_) {
    if (slot.memory != nullptr && (slot.state == SlotState::kGranted || slot.state == SlotState::kFilled)) {
      used.push_back(&slot);
    }
  }
  if (used.empty()) return;
  const OwnWindow& memory = *used[random % used.size()]->memory;
  const std::uint64_t bit = random / 64 % (memory.bytes() * 8);
  *reinterpret_cast<std::uint8_t*>(memory.local() + bit / 8) ^= static_cast<std::uint8_t>(1 << bit % 8);
}

bool Inspect::up(const Engine& engine, std::uint32_t link) {
  const auto found = engine.links_.find(link);
  return found != engine.links_.end() && found->second->up();
}

bool Inspect::settled(const Engine& engine) {
  return engine.commands_.empty() && engine.incoming_.empty();
}

}  // namespace hetkv::engine
