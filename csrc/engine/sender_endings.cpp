// How the sender's requests, tickets and links end: rejection, failure, deadlines, links that are lost, the stop.
#include <algorithm>
#include <utility>

#include "engine/sender.h"

namespace hetkv::engine {
namespace {

constexpr std::size_t kMaxRemembered = 4096;

}  // namespace

void Sender::reject(Link& link, const wire::RequestId& id, std::uint64_t epoch, Status why) {
  if (!link.up()) return;
  wire::Prelude prelude;
  prelude.type = wire::Type::kAbort;
  prelude.request = id;
  prelude.epoch = epoch;
  send(link, prelude, wire::Abort{wire_code(why.code, link.config.minor), std::move(why.detail)});
}

void Sender::cancel(Lane& lane) {
  if (lane.cancelled) return;
  unplace(lane);
  lane.cancelled = true;
  if (lane.link->state == LinkState::kGone) return;
  if (lane.remaining > 0) --windows_[lane.link->id].open;
  if (lane.link->up()) release_idle(*lane.link);
}

void Sender::fail(Request& request, Status status, const Link* reporter) {
  if (!request.failure.ok()) return;
  request.failure = std::move(status);
  failed_.push_back(request.handle);
  ++stats_.failed_requests;
  Ended ended{now_ns(), request.failure, {}};
  if (reporter != nullptr) ended.informed.push_back(reporter->config.name);
  for (const auto& lane : request.lanes) ended.informed.push_back(lane.link->config.name);
  remember(request.id, std::move(ended));
  for (auto& lane : request.lanes) {
    if (lane.cancelled || lane.delivered) continue;
    if (lane.link.get() != reporter) reject(*lane.link, request.id, lane.epoch, request.failure);
    cancel(lane);
  }
}

void Sender::reject(wire::RequestId id, std::string reason) {
  post([this, id, reason = std::move(reason)] {
    if (handles_.count(id) != 0) return;
    remember(id, {now_ns(), Status::error(Code::kAborted, reason), {}, true});
    const auto waiting = pending_.equal_range(id);
    for (auto at = waiting.first; at != waiting.second;) {
      const auto link = at->second.link;
      reject(*link, id, at->second.epoch, Status::error(Code::kAborted, reason));
      at = drop_ticket(at);
      if (link->up()) release_idle(*link);
    }
  });
}

void Sender::remember(const wire::RequestId& id, Ended ended) {
  while (!ended_order_.empty() &&
         (ended_order_.size() >= kMaxRemembered || ended.at_ns - ended_order_.front().first > Ended::kFinalNs)) {
    const auto found = ended_.find(ended_order_.front().second);
    if (found != ended_.end() && found->second.at_ns == ended_order_.front().first) ended_.erase(found);
    ended_order_.pop_front();
  }
  ended_order_.emplace_back(ended.at_ns, id);
  ended_[id] = std::move(ended);
}

// Tells the caller, once each, that the request's blocks are free and that all its receivers have their parts.
void Sender::conclude(Request& request) {
  if (!request.failure.ok() || request.packing > 0 || request.lanes.empty()) return;
  std::size_t served = 0;
  bool delivered = true;
  bool idle = true;
  for (const auto& lane : request.lanes) {
    idle = idle && lane.in_flight == 0;
    if (lane.cancelled) continue;
    if (lane.remaining > 0) return;
    delivered = delivered && lane.delivered;
    ++served;
  }
  if (served == 0 || served < request.lanes.back().link->config.instance_links) return;
  if (!request.packed) tell_packed(*request.outcome);
  request.packed = true;
  if (!delivered || !idle) return;
  const auto outcome = request.outcome;
  erase(request);
  tell_end(*outcome);
}

void Sender::erase(Request& request) {
  deadlines_.erase({request.deadline_ns, request.handle});
  handles_.erase(request.id);
  requests_.erase(request.handle);
}

std::uint64_t Sender::deadline() const {
  const std::uint64_t held = deadlines_.empty() ? 0 : deadlines_.begin()->first;
  const std::uint64_t asked = pending_.empty() ? 0 : pending_deadline_ns_;
  return held == 0 || asked == 0 ? held + asked : std::min(held, asked);
}

// Ends requests that have failed and drained, and lets deadlines run out.
bool Sender::sweep(std::uint64_t now) {
  while (!deadlines_.empty() && now > deadlines_.begin()->first) {
    Request& request = requests_.at(deadlines_.begin()->second);
    deadlines_.erase(deadlines_.begin());
    fail(request, Status::error(Code::kLeaseExpired, request.lanes.empty()
                                                         ? "no receiver asked for the request within the hold time"
                                                         : "the receiver did not finish within the hold time"));
  }
  bool moved = false;
  std::vector<std::uint64_t> draining;
  for (const std::uint64_t handle : std::exchange(failed_, {})) {
    Request& request = requests_.at(handle);
    const bool drained = request.packing == 0 && std::all_of(request.lanes.begin(), request.lanes.end(),
                                                             [](const Lane& lane) { return lane.in_flight == 0; });
    if (!drained) {
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
  if (!pending_.empty() && now > pending_deadline_ns_) sweep_tickets(now);
  return moved;
}

void Sender::sweep_tickets(std::uint64_t now) {
  std::uint64_t next = ~std::uint64_t{0};
  for (auto at = pending_.begin(); at != pending_.end();) {
    if (now <= at->second.deadline_ns) {
      next = std::min(next, at->second.deadline_ns);
      ++at;
      continue;
    }
    const auto link = at->second.link;
    at = drop_ticket(at);
    if (link->up()) release_idle(*link);
  }
  pending_deadline_ns_ = next;
}

void Sender::on_link_up(Link& link) {
  windows_[link.id];
}

void Sender::on_link_lost(Link& link, const Status& status) {
  for (auto at = pending_.begin(); at != pending_.end();) {
    at = at->second.link.get() == &link ? drop_ticket(at) : std::next(at);
  }
  for (auto& [handle, request] : requests_) {
    for (const auto& lane : request.lanes) {
      if (lane.link.get() == &link && !lane.cancelled && !lane.delivered) {
        fail(request, Status::error(status.code, link.config.name + ": " + status.detail), &link);
        break;
      }
    }
  }
}

bool Sender::link_drained(const Link& link) const {
  return std::none_of(bundles_.begin(), bundles_.end(),
                      [&](const auto& bundle) { return bundle->link.get() == &link && !bundle->task.done; });
}

bool Sender::link_idle(const Link& link) const {
  return std::none_of(bundles_.begin(), bundles_.end(), [&](const auto& at) { return at->link.get() == &link; });
}

void Sender::on_link_closed(Link& link) {
  windows_.erase(link.id);
  leave(link.id, nullptr);
}

void Sender::on_stop(const Status& status) {
  for (auto& [handle, request] : requests_) fail(request, status);
  pending_.clear();
}

void Sender::on_ended() {
  windows_.clear();
  for (auto& unused : staging_) unused.clear();
}

Sender::Request* Sender::find(const wire::RequestId& id) {
  const auto found = handles_.find(id);
  return found == handles_.end() ? nullptr : &requests_.at(found->second);
}

}  // namespace hetkv::engine
