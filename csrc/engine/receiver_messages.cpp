// The receiver's slots, endings and answers to messages other than frames.
#include <algorithm>
#include <utility>

#include "engine/receiver.h"

namespace hetkv::engine {
namespace {

// Bytes of slots in a grant: a message stays within one fragment of any transport, so that none overtakes.
constexpr std::size_t kMostInGrant = 3072;
constexpr std::size_t kSlotGrantBytes = 32;  // and the key

}  // namespace

void Receiver::on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) {
  Status status;
  switch (prelude.type) {
    case wire::Type::kFrame: {
      wire::Frame frame;
      status = wire::decode(data, size, &frame);
      if (status.ok()) on_frame(link, prelude, frame);
      break;
    }
    case wire::Type::kBundle: {
      wire::Bundle bundle;
      status = wire::decode(data, size, &bundle);
      if (status.ok()) on_bundle(link, bundle);
      break;
    }
    case wire::Type::kRelease: {
      wire::Release release;
      status = wire::decode(data, size, &release);
      if (status.ok()) on_release(link, release);
      break;
    }
    case wire::Type::kWant:
      demands_[link.id].hungry = true;
      slots_moved_ = true;
      break;
    case wire::Type::kAbort: {
      wire::Abort abort;
      status = wire::decode(data, size, &abort);
      if (status.ok()) on_abort(link, prelude, abort);
      break;
    }
    default:
      status = Status::error(Code::kProtocol,
                             "a sender does not send message type " + std::to_string(static_cast<int>(prelude.type)));
  }
  if (!status.ok()) lose(link, status);
}

void Receiver::on_release(Link& link, const wire::Release& release) {
  for (const auto& name : release.slots) {
    Slot* slot = slots_.at(name.slot);
    if (slot == nullptr || slot->state != SlotState::kLent || slot->link != link.id ||
        slot->generation != name.generation) {
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(name.slot) +
                                                           " was released by a sender that does not hold it"));
    }
    slots_.free(name.slot);
  }
  Demand& demand = demands_[link.id];
  demand.recalled = false;
  if (release.slots.empty()) return;  // it uses them all: each comes back with a frame
  demand.hungry = false;
  slots_moved_ = true;
}

void Receiver::on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort) {
  if (Request* request = find(prelude.request, prelude.epoch)) {
    fail(*request, Status::error(abort.code, link.config.name + ": the sender gave the request up: " + abort.reason),
         &link);
  }
}

bool Receiver::step(std::uint64_t now) {
  mover_->poll(&unpacked_);
  bool moved = !unpacked_.empty();
  for (RemapTask* task : std::exchange(unpacked_, {})) finish(*static_cast<Unpack*>(task->owner));
  moved |= sweep(now);
  if (slots_moved_) moved |= grant();
  stats_.lent_slots = slots_.in_use();
  return moved;
}

// Lends free slots to the links that can use them: to the one that holds fewest, among equals to the one that waited
// longest. Where one has none, asks for what others do not use.
bool Receiver::grant() {
  slots_moved_ = false;
  std::vector<Link*> hungry;
  std::size_t contenders = 0;
  for (auto& [id, at] : links_) {
    if (!at->up()) continue;
    const Demand& demand = demands_[id];
    const bool wants = demand.hungry && demand.open > 0;
    if (wants) hungry.push_back(at.get());
    if (wants || slots_.held_by(id) > 0) ++contenders;
  }
  if (hungry.empty()) return false;
  const std::size_t share = std::max<std::size_t>((slots_.size() - slots_.quarantined()) / hungry.size(), 1);
  const std::size_t most = std::min<std::size_t>(share, static_cast<std::size_t>(config_.max_slots_per_link));
  const auto order = [&](const Link* at) { return std::make_pair(slots_.held_by(at->id), demands_[at->id].served); };
  std::map<std::uint32_t, std::pair<wire::Grant, std::size_t>> grants;  // by link; and its bytes
  wire::Prelude prelude;
  prelude.type = wire::Type::kGrant;
  Status status;
  bool lent = false;
  while (slots_.free_slots() > 0) {
    Link* at = *std::min_element(hungry.begin(), hungry.end(), [&](Link* a, Link* b) { return order(a) < order(b); });
    if (slots_.held_by(at->id) >= most) break;
    std::uint32_t id = 0;
    const Slot* slot = slots_.lend(*transport_, at->id, where(*at), &id, &status);
    if (slot == nullptr) break;
    lent = true;
    Demand& demand = demands_[at->id];
    demand.served = ++grants_;
    wire::SlotGrant given{id, slot->generation, slot->memory->address(), slot->memory->bytes(), {}};
    const auto [known, fresh] = demand.keys.emplace(id, slot->generation);
    if (fresh || known->second != slot->generation) {
      status = slot->memory->share(*at->endpoint, {id, slot->generation}, &given.rkey);
      if (!status.ok()) {
        lose(*at, std::exchange(status, {}));
        break;
      }
    }
    known->second = slot->generation;
    auto& [grant, bytes] = grants[at->id];
    const std::size_t more = kSlotGrantBytes + given.rkey.size();
    if (bytes > 0 && bytes + more > kMostInGrant) {
      send(*at, prelude, std::exchange(grant, {}));
      bytes = 0;
    }
    grant.slots.push_back(std::move(given));
    bytes += more;
  }
  for (auto& [id, grant] : grants) send(*links_.at(id), prelude, grant.first);
  const bool starved = std::any_of(hungry.begin(), hungry.end(), [&](Link* at) { return slots_.held_by(at->id) == 0; });
  if (starved && !status.ok() && slots_.in_use() == 0) {
    for (Link* at : hungry) lose(*at, status);  // no slot can be made, and none will come back
  } else if (starved) {
    recall(contenders);
  }
  return lent;
}

// A sender that is busy with its slots loses none by this; one that waits gives them back and asks when it needs them.
void Receiver::recall(std::size_t contenders) {
  const std::size_t usable = slots_.size() - slots_.quarantined();
  for (auto& [id, at] : links_) {
    Demand& demand = demands_[id];
    if (!at->up() || demand.recalled || slots_.held_by(id) * contenders <= usable) continue;
    demand.recalled = true;
    wire::Prelude prelude;
    prelude.type = wire::Type::kRecall;
    send(*at, prelude, wire::Release{});
  }
}

// The part is complete, or its request has failed: it needs no more slots.
void Receiver::close_part(const Part& part) {
  const auto found = demands_.find(part.link->id);
  if (found != demands_.end()) --found->second.open;
}

void Receiver::fail(Request& request, Status status, const Link* told_by) {
  if (!request.failure.ok()) return;
  request.failure = std::move(status);
  failed_.push_back(request.handle);
  ++stats_.failed_requests;
  wire::Prelude prelude;
  prelude.type = wire::Type::kAbort;
  prelude.request = request.id;
  prelude.epoch = request.epoch;
  for (auto& part : request.parts) {
    if (part.remaining > 0) close_part(part);
    if (part.link.get() != told_by && part.link->up() && !part.done) {
      send(*part.link, prelude,
           wire::Abort{wire_code(request.failure.code, part.link->config.minor), request.failure.detail});
    }
  }
}

// Ends requests that have failed and drained, and lets leases run out.
bool Receiver::sweep(std::uint64_t now) {
  while (!deadlines_.empty() && now > deadlines_.begin()->first) {
    Request& request = requests_.at(deadlines_.begin()->second);
    deadlines_.erase(deadlines_.begin());
    fail(request, Status::error(Code::kLeaseExpired, "the request was not complete when its lease ran out"));
  }
  bool moved = false;
  std::vector<std::uint64_t> draining;
  for (const std::uint64_t handle : std::exchange(failed_, {})) {
    Request& request = requests_.at(handle);
    if (request.unpacking > 0) {
      draining.push_back(handle);
      continue;
    }
    const auto outcome = request.outcome;
    Status failure = std::move(request.failure);
    erase(request);
    tell_end(*outcome, std::move(failure));
    moved = true;
  }
  failed_.insert(failed_.end(), draining.begin(), draining.end());
  return moved;
}

void Receiver::on_link_up(Link& link) {
  demands_[link.id];
}

void Receiver::on_link_lost(Link& link, const Status& status) {
  slots_.quarantine(link.id);
  slots_moved_ = true;
  stats_.quarantined_slots = slots_.quarantined();
  for (auto& [handle, request] : requests_) {
    for (const auto& part : request.parts) {
      if (part.link.get() == &link && !part.done) {
        fail(request, Status::error(status.code, link.config.name + ": " + status.detail), &link);
        break;
      }
    }
  }
}

void Receiver::on_link_closed(Link& link) {
  demands_.erase(link.id);
}

void Receiver::on_stop(const Status& status) {
  for (auto& [handle, request] : requests_) fail(request, status);
}

void Receiver::on_ended() {
  slots_.release();
  if (gates_) gates_->close_all();
}

}  // namespace hetkv::engine
