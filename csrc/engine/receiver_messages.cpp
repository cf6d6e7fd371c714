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
      rank(link.id);
      slots_moved_ = true;
      break;
    case wire::Type::kHostOnly:
      link.device_windows = false;
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
    if (slot == nullptr || slot->state != SlotState::kGranted || slot->link != link.id ||
        slot->generation != name.generation) {
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(name.slot) +
                                                           " was released by a sender that does not hold it"));
    }
    give_back(name.slot);
  }
  Demand& demand = demands_[link.id];
  demand.recalled = false;
  if (release.slots.empty()) return;  // it uses them all: each comes back with a frame
  demand.hungry = false;
  rank(link.id);
  slots_moved_ = true;
}

void Receiver::on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort) {
  Request* request = find(prelude.request, prelude.epoch);
  if (request != nullptr && part_of(*request, link) != nullptr) {  // it can give up nothing of another peer's
    fail(*request, Status::error(abort.code, link.config.name + ": the sender gave the request up: " + abort.reason),
         &link);
  }
}

bool Receiver::step(std::uint64_t now) {
  mover_->poll(&unpacked_);
  bool moved = !unpacked_.empty();
  for (RemapTask* task : std::exchange(unpacked_, {})) go_on(*task);
  moved |= sweep(now);
  if (slots_moved_) moved |= grant();
  stats_.granted_slots = slots_.in_use();
  return moved;
}

// Puts the link where it belongs among those that can use slots: after those that hold fewer, or waited longer.
void Receiver::rank(std::uint32_t id) {
  const auto found = demands_.find(id);
  if (found == demands_.end()) return;
  Demand& demand = found->second;
  if (demand.ranked) wanting_.erase(*demand.ranked);
  demand.ranked.reset();
  if (!demand.hungry || demand.open == 0) return;
  demand.ranked = {slots_.held_by(id), demand.served, id};
  wanting_.insert(*demand.ranked);
}

void Receiver::give_back(std::uint32_t slot) {
  const std::uint32_t holder = slots_.at(slot)->link;
  slots_.free(slot);
  rank(holder);
  slots_moved_ = true;
}

// Grants free slots to the links that can use them. Where one has none, asks for what others do not use.
bool Receiver::grant() {
  slots_moved_ = false;
  if (wanting_.empty()) return false;
  const std::size_t share = std::max<std::size_t>((slots_.size() - slots_.quarantined()) / wanting_.size(), 1);
  const std::size_t most = std::min<std::size_t>(share, static_cast<std::size_t>(config_.max_slots_per_link));
  struct Message {
    std::shared_ptr<Link> link;
    wire::Grant grant;
    std::size_t bytes = 0;
  };
  std::vector<Message> messages;
  wire::Prelude prelude;
  prelude.type = wire::Type::kGrant;
  Status status;
  while (slots_.free_slots() > 0 && !wanting_.empty()) {
    const auto [held, served, link_id] = *wanting_.begin();
    if (held >= most) break;
    const auto at = link(link_id);
    std::uint32_t id = 0;
    const Slot* slot = slots_.grant(*transport_, link_id, where(*at), &id, &status);
    if (slot == nullptr) break;
    Demand& demand = demands_[link_id];
    demand.served = ++grants_;
    demand.recalled = false;  // its answer says nothing of this slot, which it may keep for work that does not come
    rank(link_id);
    wire::SlotGrant given{id, slot->generation, 0, slot->memory->bytes(), {}};
    const auto [known, fresh] = demand.keys.emplace(id, slot->generation);
    if (fresh || known->second != slot->generation) {
      status = slot->memory->share(*at->endpoint, &given);
      if (!status.ok()) {
        lose(*at, std::exchange(status, {}));
        break;
      }
    }
    known->second = slot->generation;
    auto mine = std::find_if(messages.begin(), messages.end(), [&](const Message& to) { return to.link == at; });
    if (mine == messages.end()) mine = messages.insert(mine, {at, {}, 0});
    const std::size_t more = kSlotGrantBytes + given.rkey.size();
    if (mine->bytes > 0 && mine->bytes + more > kMostInGrant) {
      send(*at, prelude, std::exchange(mine->grant, {}));
      mine->bytes = 0;
    }
    mine->grant.slots.push_back(std::move(given));
    mine->bytes += more;
  }
  for (const Message& message : messages) {
    if (message.link->up()) send(*message.link, prelude, message.grant);
  }
  const bool starved = !wanting_.empty() && std::get<0>(*wanting_.begin()) == 0;
  if (starved && !status.ok() && slots_.in_use() == 0) {
    const auto all = wanting_;
    for (const auto& [held, served, id] : all) lose(*link(id), status);  // no slot can be made, and none will come back
  } else if (starved) {
    recall();
  }
  return !messages.empty();
}

// A sender that is busy with its slots loses none by this; one that waits gives them back and asks when it needs them.
void Receiver::recall() {
  const std::size_t usable = slots_.size() - slots_.quarantined();
  std::size_t contenders = wanting_.size();
  for (const auto& [id, held] : slots_.holders()) contenders += demands_[id].ranked ? 0 : 1;
  for (const auto& [id, held] : slots_.holders()) {
    Demand& demand = demands_[id];
    const auto at = link(id);
    if (at == nullptr || !at->up() || demand.recalled || held * contenders <= usable) continue;
    demand.recalled = true;
    wire::Prelude prelude;
    prelude.type = wire::Type::kRecall;
    send(*at, prelude, wire::Release{});
  }
}

// The part is complete, or its request has failed: it needs no more slots.
void Receiver::close_part(const Part& part) {
  const auto found = demands_.find(part.link->id);
  if (found != demands_.end() && --found->second.open == 0) rank(part.link->id);
}

void Receiver::fail(Request& request, Status status, const Link* reporter) {
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
    if (part.link.get() != reporter && part.link->up() && !part.done) {
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
  demands_[link.id].hungry = false;
  rank(link.id);
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
  if (link.retired) {
    slots_.retire(link.id);
  } else {
    slots_.retire_host(link.id);
  }
  stats_.quarantined_slots = slots_.quarantined();
  slots_moved_ = true;
}

void Receiver::on_stop(const Status& status) {
  for (auto& [handle, request] : requests_) fail(request, status);
}

void Receiver::on_ended() {
  slots_.release();
  scratch_.reset();
  device_scratch_.reset();
  if (gates_) gates_->close_all();
}

}  // namespace hetkv::engine
