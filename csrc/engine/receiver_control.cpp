// The receiver's slots, endings and answers to messages other than frames.
#include <algorithm>

#include "engine/receiver.h"

namespace hetkv {
namespace {

constexpr std::uint64_t kMs = 1'000'000;

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
      status = Status::error(Code::kProtocol, "a sender does not send message type " +
                                                  std::to_string(static_cast<int>(prelude.type)));
  }
  if (!status.ok()) lose(link, status);
}

void Receiver::on_release(Link& link, const wire::Release& release) {
  for (const auto& name : release.slots) {
    Slot* slot = slots_.at(name.slot);
    if (slot == nullptr || slot->state != SlotState::kLent || slot->link != link.id || slot->generation != name.generation) {
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(name.slot) + " was released by a sender that does not hold it"));
    }
    slots_.free(name.slot);
  }
  demands_[link.id].hungry = false;
  demands_[link.id].recalled = false;
  slots_moved_ = true;
}

void Receiver::on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort) {
  if (Request* request = find(prelude.request, prelude.epoch)) {
    fail(*request, Status::error(abort.code, link.config.name + ": the sender gave the request up: " + abort.reason), &link);
  }
}

bool Receiver::step(std::uint64_t now) {
  bool moved = false;
  for (auto at = unpacks_.begin(); at != unpacks_.end();) {
    if (finish(**at)) {
      at = unpacks_.erase(at);
      moved = true;
    } else {
      ++at;
    }
  }
  if (slots_moved_) moved |= grant();
  return sweep(now) || moved;
}

bool Receiver::active(const Link& link) const {
  return std::any_of(requests_.begin(), requests_.end(), [&](const auto& at) {
    return at.second.failure.ok() && std::any_of(at.second.parts.begin(), at.second.parts.end(), [&](const Part& part) {
             return part.link == &link && part.remaining > 0;
           });
  });
}

// Lends free slots to the links that can use them, evenly; recalls unused ones where a link has none.
bool Receiver::grant() {
  slots_moved_ = false;
  std::vector<Link*> hungry;
  for (auto& [id, at] : links_) {
    if (at->up() && demands_[id].hungry && active(*at)) hungry.push_back(at.get());
  }
  if (hungry.empty()) return false;
  const std::size_t share = std::max<std::size_t>(slots_.size() / hungry.size(), 1);
  const std::size_t most = std::min<std::size_t>(share, static_cast<std::size_t>(config_.max_slots_per_link));
  std::map<Link*, wire::Grant> grants;
  bool starved = false;
  for (bool lent = true; lent;) {
    lent = false;
    for (Link* at : hungry) {
      const std::size_t held = slots_.held_by(at->id);
      if (held >= most) continue;
      std::uint32_t id = 0;
      Status status;
      Slot* slot = slots_.lend(*worker_, at->id, &id, &status);
      if (slot == nullptr) {
        if (!status.ok()) return lose(*at, status), true;
        starved |= held == 0;
        continue;
      }
      lent = true;
      wire::SlotGrant given{id, slot->generation, slot->memory->address(), slot->memory->bytes(), {}};
      auto [known, fresh] = demands_[at->id].keys.emplace(id, slot->generation);
      if (fresh || known->second != slot->generation) given.rkey = slot->memory->rkey();
      known->second = slot->generation;
      grants[at].slots.push_back(std::move(given));
    }
  }
  for (auto& [at, grant] : grants) {
    wire::Prelude prelude;
    prelude.type = wire::Type::kGrant;
    send(*at, prelude, grant);
  }
  if (starved) {
    for (auto& [id, at] : links_) {
      Demand& demand = demands_[id];
      if (!at->up() || demand.recalled || slots_.held_by(id) <= share) continue;
      demand.recalled = true;
      wire::Prelude prelude;
      prelude.type = wire::Type::kRecall;
      send(*at, prelude, wire::Release{});
    }
  }
  return !grants.empty();
}

void Receiver::fail(Request& request, Status status, const Link* told_by) {
  if (!request.failure.ok()) return;
  request.failure = std::move(status);
  ended_ = true;
  ++stats_.failed_requests;
  wire::Prelude prelude;
  prelude.type = wire::Type::kAbort;
  prelude.request = request.id;
  prelude.epoch = request.epoch;
  for (auto& part : request.parts) {
    if (part.link != told_by && part.link->up() && !part.done) {
      send(*part.link, prelude, wire::Abort{request.failure.code, request.failure.detail.substr(0, 500)});
    }
  }
}

// Ends requests that have failed and drained, and lets leases run out.
bool Receiver::sweep(std::uint64_t now) {
  if (!ended_ && now - swept_ns_ < kMs) return false;
  ended_ = false;
  swept_ns_ = now;
  bool moved = false;
  for (auto at = requests_.begin(); at != requests_.end();) {
    Request& request = at->second;
    if (request.failure.ok() && now > request.deadline_ns) {
      fail(request, Status::error(Code::kLeaseExpired, "the request was not complete when its lease ran out"));
    }
    if (request.failure.ok() || request.unpacking > 0) {
      ++at;
      continue;
    }
    events_.push({EventKind::kFailed, request.handle, 0, -1, request.failure});
    handles_.erase(request.id);
    at = requests_.erase(at);
    moved = true;
  }
  return moved;
}

void Receiver::on_link_up(Link& link) { demands_[link.id]; }

void Receiver::on_link_lost(Link& link, const Status& status) {
  slots_.quarantine(link.id);
  stats_.quarantined_slots = slots_.quarantined();
  for (auto& [handle, request] : requests_) {
    for (const auto& part : request.parts) {
      if (part.link == &link && !part.done) {
        fail(request, Status::error(status.code, link.config.name + ": " + status.detail), &link);
        break;
      }
    }
  }
}

void Receiver::on_link_closed(Link& link) { demands_.erase(link.id); }

void Receiver::on_stop() {
  for (auto& [handle, request] : requests_) fail(request, Status::error(Code::kClosed, "the receiver was closed"));
}

}  // namespace hetkv
