// The sender's answers to messages and endings: tickets, slots, completion, failure.
#include <algorithm>

#include "engine/sender.h"

namespace hetkv {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::size_t kMaxPendingTickets = 1 << 16;

template <typename Body, typename Then>
Status with_body(const std::uint8_t* data, std::size_t size, Then then) {
  Body body;
  auto status = wire::decode(data, size, &body);
  if (status.ok()) then(std::move(body));
  return status;
}

}  // namespace

void Sender::on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) {
  Status status;
  switch (prelude.type) {
    case wire::Type::kTicket:
      status = with_body<wire::Ticket>(data, size, [&](wire::Ticket body) { on_ticket(link, prelude, std::move(body)); });
      break;
    case wire::Type::kGrant:
      status = with_body<wire::Grant>(data, size, [&](wire::Grant body) { on_grant(link, body); });
      break;
    case wire::Type::kRecall:
      status = with_body<wire::Release>(data, size, [&](wire::Release body) { on_recall(link, body); });
      break;
    case wire::Type::kDone:
      on_done(link, prelude);
      break;
    case wire::Type::kAbort:
      status = with_body<wire::Abort>(data, size, [&](wire::Abort body) { on_abort(link, prelude, body); });
      break;
    default:
      status = Status::error(Code::kProtocol, "a receiver does not send message type " +
                                                  std::to_string(static_cast<int>(prelude.type)));
  }
  if (!status.ok()) lose(link, status);
}

void Sender::on_ticket(Link& link, const wire::Prelude& prelude, wire::Ticket ticket) {
  if (Request* request = find(prelude.request)) {
    add_lane(*request, link, prelude.epoch, std::move(ticket.groups));
  } else if (pending_.size() >= kMaxPendingTickets) {
    refuse(link, prelude.request, prelude.epoch, Status::error(Code::kProtocol, "too many tickets wait for their requests"));
  } else {
    pending_.emplace(prelude.request, PendingTicket{&link, prelude.epoch, std::move(ticket.groups), now_ns() + ticket.lease_ms * kMs});
  }
}

void Sender::on_grant(Link& link, const wire::Grant& grant) {
  LinkWindows& windows = windows_[link.id];
  windows.released = false;
  for (const auto& given : grant.slots) {
    Window& window = windows.slots[given.slot];
    if (window.granted) return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(given.slot) + " was granted twice"));
    if (!given.rkey.empty()) {
      window.memory.reset();
      window.generation = given.generation;
      if (auto status = link.endpoint->open(given.rkey, given.address, given.bytes, &window.memory); !status.ok()) {
        return lose(link, status);
      }
    } else if (!window.memory || window.generation != given.generation) {
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(given.slot) + " was granted without its key"));
    }
    window.granted = true;
    windows.free.push_back(given.slot);
  }
  release_idle(link);  // the work may have ended while the grant travelled
}

void Sender::on_recall(Link& link, const wire::Release&) {
  LinkWindows& windows = windows_[link.id];
  if (windows.free.empty()) return;
  wire::Release release;
  for (const auto slot : windows.free) {
    windows.slots[slot].granted = false;
    release.slots.push_back({slot, windows.slots[slot].generation});
  }
  windows.free.clear();
  windows.released = true;
  wire::Prelude prelude;
  prelude.type = wire::Type::kRelease;
  send(link, prelude, release);
}

void Sender::give_back(Link& link, std::uint32_t slot) {
  windows_[link.id].free.push_back(slot);
  release_idle(link);
}

void Sender::release_idle(Link& link) {
  if (!windows_[link.id].lanes.empty()) return;
  const bool expected = std::any_of(pending_.begin(), pending_.end(), [&](const auto& at) { return at.second.link == &link; });
  if (!expected) on_recall(link, {});
}

void Sender::on_done(Link& link, const wire::Prelude& prelude) {
  Request* request = find(prelude.request);
  if (request == nullptr) return;
  std::size_t delivered = 0;
  for (auto& lane : request->lanes) {
    if (lane.link == &link && lane.epoch == prelude.epoch && lane.remaining == 0) lane.delivered = true;
    if (lane.delivered) ++delivered;
  }
  if (delivered < link.config.instance_links || request->packing > 0) return;
  check_packed(*request);
  events_.push({EventKind::kComplete, request->handle, link.id, -1, {}});
  handles_.erase(request->id);
  requests_.erase(request->handle);
}

void Sender::on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort) {
  const auto waiting = pending_.equal_range(prelude.request);
  for (auto at = waiting.first; at != waiting.second;) {
    at = at->second.link == &link && at->second.epoch == prelude.epoch ? pending_.erase(at) : std::next(at);
  }
  Request* request = find(prelude.request);
  if (request == nullptr) return;
  for (const auto& lane : request->lanes) {
    if (lane.link == &link && lane.epoch == prelude.epoch && !lane.cancelled) {
      fail(*request, Status::error(abort.code, "the receiver gave the request up: " + abort.reason), &link);
      return;
    }
  }
}

void Sender::refuse(Link& link, const wire::RequestId& id, std::uint64_t epoch, Status why) {
  if (!link.up()) return;
  wire::Prelude prelude;
  prelude.type = wire::Type::kAbort;
  prelude.request = id;
  prelude.epoch = epoch;
  send(link, prelude, wire::Abort{why.code, std::move(why.detail)});
}

void Sender::cancel(Lane& lane) {
  lane.cancelled = true;
  auto& lanes = windows_[lane.link->id].lanes;
  lanes.erase(std::remove(lanes.begin(), lanes.end(), &lane), lanes.end());
  if (lane.link->up()) release_idle(*lane.link);
}

void Sender::fail(Request& request, Status status, const Link* told_by) {
  if (!request.failure.ok()) return;
  request.failure = std::move(status);
  ended_ = true;
  ++stats_.failed_requests;
  for (auto& lane : request.lanes) {
    if (lane.cancelled || lane.delivered) continue;
    if (lane.link != told_by) refuse(*lane.link, request.id, lane.epoch, request.failure);
    cancel(lane);
  }
}

void Sender::check_packed(Request& request) {
  if (request.packed || request.packing > 0 || request.lanes.empty()) return;
  std::size_t done = 0;
  for (const auto& lane : request.lanes) {
    if (lane.cancelled) continue;
    if (lane.remaining > 0) return;
    ++done;
  }
  if (done < request.lanes.front().link->config.instance_links) return;
  request.packed = true;
  events_.push({EventKind::kPacked, request.handle, 0, -1, {}});
}

// Ends requests that have failed and drained, and lets deadlines run out.
bool Sender::sweep(std::uint64_t now) {
  if (!ended_ && now - swept_ns_ < kMs) return false;
  ended_ = false;
  swept_ns_ = now;
  bool moved = false;
  for (auto at = requests_.begin(); at != requests_.end();) {
    Request& request = at->second;
    if (request.failure.ok() && request.deadline_ns != 0 && now > request.deadline_ns) {
      const bool served = !request.lanes.empty();
      fail(request, Status::error(Code::kLeaseExpired, served ? "the receiver did not finish within the hold time"
                                                              : "no receiver asked for the request within the hold time"));
    }
    const bool drained = request.packing == 0 && std::all_of(request.lanes.begin(), request.lanes.end(),
                                                             [](const Lane& lane) { return lane.in_flight == 0; });
    if (request.failure.ok() || !drained) {
      ++at;
      continue;
    }
    events_.push({EventKind::kFailed, request.handle, 0, -1, request.failure});
    handles_.erase(request.id);
    at = requests_.erase(at);
    moved = true;
  }
  for (auto at = pending_.begin(); at != pending_.end();) at = now > at->second.deadline_ns ? pending_.erase(at) : std::next(at);
  return moved;
}

void Sender::on_link_up(Link& link) { windows_[link.id]; }

void Sender::on_link_lost(Link& link, const Status& status) {
  for (auto at = pending_.begin(); at != pending_.end();) at = at->second.link == &link ? pending_.erase(at) : std::next(at);
  for (auto& [handle, request] : requests_) {
    for (const auto& lane : request.lanes) {
      if (lane.link == &link && !lane.cancelled && !lane.delivered) {
        fail(request, Status::error(status.code, link.config.name + ": " + status.detail), &link);
        break;
      }
    }
  }
}

bool Sender::link_drained(const Link& link) const {
  return std::none_of(transfers_.begin(), transfers_.end(), [&](const auto& transfer) {
    return transfer->lane->link == &link && transfer->stage == Stage::kPacking;
  });
}

void Sender::on_link_closed(Link& link) { windows_.erase(link.id); }

void Sender::on_stop() {
  for (auto& [handle, request] : requests_) fail(request, Status::error(Code::kClosed, "the sender was closed"));
  pending_.clear();
}

Sender::Request* Sender::find(const wire::RequestId& id) {
  const auto found = handles_.find(id);
  return found == handles_.end() ? nullptr : &requests_.at(found->second);
}

}  // namespace hetkv
