// The sender's answers to messages: tickets, slots, completion, failure.
#include <algorithm>
#include <utility>

#include "engine/ranges.h"
#include "engine/sender.h"

namespace hetkv::engine {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::size_t kMaxPendingTickets = 1 << 16;
constexpr std::size_t kMaxPendingPerLink = 1 << 12;
constexpr std::uint64_t kRememberNs = 10'000 * kMs;
constexpr std::size_t kMostInRelease = 256;  // slots: a message stays within one fragment of any transport

// What an error says of a content.
std::string text_of(const std::optional<wire::Content>& content) {
  constexpr char kDigits[] = "0123456789abcdef";
  if (!content) return "none";
  std::string text;
  for (const std::uint8_t byte : *content) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

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
    case wire::Type::kBoundTicket:
      status =
          with_body<wire::Ticket>(data, size, [&](wire::Ticket body) { on_ticket(link, prelude, std::move(body)); });
      break;
    case wire::Type::kGrant:
      status = with_body<wire::Grant>(data, size, [&](wire::Grant body) { on_grant(link, body); });
      break;
    case wire::Type::kRecall:
      status = with_body<wire::Release>(data, size, [&](const wire::Release&) {
        while (link.up() && feed(link)) {  // what is ready uses its slots first: they may have come just now
        }
        if (!link.up()) return;
        windows_[link.id].recalled = true;
        release(link);
      });
      break;
    case wire::Type::kDone:
      status = with_body<wire::Done>(data, size, [&](const wire::Done& body) { on_done(link, prelude, body); });
      break;
    case wire::Type::kAbort:
      status = with_body<wire::Abort>(data, size, [&](wire::Abort body) { on_abort(link, prelude, body); });
      break;
    default:
      status = Status::error(Code::kProtocol,
                             "a receiver does not send message type " + std::to_string(static_cast<int>(prelude.type)));
  }
  if (!status.ok()) lose(link, status);
}

void Sender::on_ticket(Link& link, const wire::Prelude& prelude, wire::Ticket ticket) {
  take_ticket(prelude.request, {this->link(link.id), prelude.epoch, std::move(ticket.groups),
                                now_ns() + ticket.lease_ms * kMs, ticket.content});
}

// A ticket without a request waits for it, in place of an earlier one of the same peer: that attempt is over for it. So
// one whose receiver had everything already, and has ended, does not serve a request that a later one asks for.
void Sender::take_ticket(const wire::RequestId& id, PendingTicket ticket) {
  Request* request = find(id);
  if (request != nullptr && request->failure.ok()) return add_lane(*request, std::move(ticket));
  if (const auto found = ended_.find(id); found != ended_.end()) {
    Ended& ended = found->second;
    const std::uint64_t age = now_ns() - ended.at_ns;
    if (ended.final && age < Ended::kFinalNs) return reject(*ticket.link, id, ticket.epoch, ended.why);
    const std::string& peer = ticket.link->config.name;
    if (!ended.final && age < kRememberNs &&
        std::find(ended.informed.begin(), ended.informed.end(), peer) == ended.informed.end()) {
      ended.informed.push_back(peer);
      return reject(*ticket.link, id, ticket.epoch, ended.why);
    }
  }
  const auto waiting = pending_.equal_range(id);
  for (auto at = waiting.first; at != waiting.second;) {
    at = at->second.link->config.name == ticket.link->config.name ? drop_ticket(at) : std::next(at);
  }
  if (pending_.size() >= kMaxPendingTickets || windows_[ticket.link->id].tickets >= kMaxPendingPerLink) {
    return reject(*ticket.link, id, ticket.epoch,
                  Status::error(Code::kProtocol, "too many tickets wait for their requests"));
  }
  ++windows_[ticket.link->id].tickets;
  pending_deadline_ns_ = pending_.empty() ? ticket.deadline_ns : std::min(pending_deadline_ns_, ticket.deadline_ns);
  pending_.emplace(id, std::move(ticket));
}

Sender::Pending::iterator Sender::drop_ticket(Pending::iterator at) {
  --windows_[at->second.link->id].tickets;
  return pending_.erase(at);
}

// The request is still to be had, by the ticket's instance.
Status Sender::check_state(const Request& request, const PendingTicket& ticket) const {
  const auto wrong = [](std::string what) { return Status::error(Code::kProtocol, std::move(what)); };
  if (request.packed) return wrong("the sender has given the request's blocks back");
  for (const auto& lane : request.lanes) {
    if (!lane.cancelled && lane.link->config.instance != ticket.link->config.instance) {
      return wrong("the request is on its way to instance " + lane.link->config.instance);
    }
  }
  return {};
}

// The ticket is for what the request is.
Status Sender::check_match(const Request& request, const PendingTicket& ticket) const {
  const auto wrong = [](std::string what) { return Status::error(Code::kProtocol, std::move(what)); };
  if (ticket.content != request.content) {
    return Status::error(Code::kContent, "content: the ticket's is " + text_of(ticket.content) + ", the request's " +
                                             text_of(request.content));
  }
  const auto& want = ticket.want;
  if (want.size() != request.tokens.size()) {
    return wrong("the ticket has " + std::to_string(want.size()) + " cache groups, the request " +
                 std::to_string(request.tokens.size()));
  }
  for (std::size_t group = 0; group < want.size(); ++group) {
    const wire::TokenRange& have = request.tokens[group];
    if (want[group].start >= want[group].stop) continue;
    if (want[group].stop > have.stop || want[group].start < have.start) {
      return wrong("the ticket asks for tokens " + range_text(want[group].start, want[group].stop) +
                   " of cache group " + std::to_string(group) + ", the request has " +
                   range_text(have.start, have.stop));
    }
  }
  return {};
}

// A ticket that comes too late is rejected alone. Where the two sides mean different things by one id no better ticket
// will come: the request ends, and both sides say why.
void Sender::add_lane(Request& request, PendingTicket ticket) {
  Link& link = *ticket.link;
  if (Status status = check_state(request, ticket); !status.ok()) {
    return reject(link, request.id, ticket.epoch, std::move(status));
  }
  if (Status status = check_match(request, ticket); !status.ok()) {
    reject(link, request.id, ticket.epoch, status);
    return fail(request, Status::error(status.code, link.config.name + ": " + status.detail), &link);
  }
  for (auto& lane : request.lanes) {
    if (lane.link->config.name == link.config.name) cancel(lane);  // the receiver tries again under a new epoch
  }
  Lane& lane = request.lanes.emplace_back();
  lane.request = &request;
  lane.epoch = ticket.epoch;
  lane.arrival = ++next_arrival_;
  lane.remaining = lane.unsent = link.plan_tokens(ticket.want);
  lane.delivered = lane.remaining == 0;  // the receiver, which asked for nothing, has said so or will
  lane.link = std::move(ticket.link);
  lane.want = std::move(ticket.want);
  if (lane.remaining > 0) ++windows_[link.id].open;
  place(lane);
  conclude(request);
}

void Sender::on_grant(Link& link, const wire::Grant& grant) {
  LinkWindows& windows = windows_[link.id];
  windows.recalled = false;
  std::uint64_t need = 0;
  for (const auto& plan : link.config.plans) need = std::max(need, plan.payload_bytes(1));
  wire::Release unreachable;
  for (const auto& given : grant.slots) {
    Window& window = windows.slots[given.slot];
    if (window.granted)
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(given.slot) + " was granted twice"));
    if (given.bytes < need) {
      return lose(link, Status::error(Code::kProtocol, "slot " + std::to_string(given.slot) + " has " +
                                                           std::to_string(given.bytes) +
                                                           " bytes, a frame of one token " + std::to_string(need)));
    }
    if (!given.rkey.empty()) {
      window.memory.reset();
      window.generation = given.generation;
      auto status = PeerWindow::open(*link.endpoint, device_, given, config_.direct, &window.memory);
      if (!status.ok()) return lose(link, status);
      if (window.memory == nullptr) {
        unreachable.slots.push_back({given.slot, given.generation});
        continue;
      }
    } else if (!window.memory || window.generation != given.generation) {
      return lose(
          link, Status::error(Code::kProtocol, "slot " + std::to_string(given.slot) + " was granted without its key"));
    }
    window.granted = true;
    windows.free.push_back(given.slot);
  }
  if (!unreachable.slots.empty()) send_back(link, unreachable);
  awaken(link);
  release_idle(link);  // the work may have ended while the grant travelled
}

// Slots in memory that this side's device cannot store into: it asks for others instead.
void Sender::send_back(Link& link, const wire::Release& slots) {
  LinkWindows& windows = windows_[link.id];
  wire::Prelude prelude;
  prelude.type = wire::Type::kHostOnly;
  if (!std::exchange(windows.host_only, true)) send(link, prelude);
  prelude.type = wire::Type::kRelease;
  send(link, prelude, slots);
  windows.released = true;
}

// Gives all free slots back, or says that there are none.
void Sender::release(Link& link) {
  LinkWindows& windows = windows_[link.id];
  wire::Prelude prelude;
  prelude.type = wire::Type::kRelease;
  wire::Release release;
  const bool none = windows.free.empty();
  for (const auto slot : std::exchange(windows.free, {})) {
    windows.released = true;
    windows.slots[slot].granted = false;
    release.slots.push_back({slot, windows.slots[slot].generation});
    if (release.slots.size() == kMostInRelease) send(link, prelude, std::exchange(release, {}));
  }
  if (!release.slots.empty() || none) send(link, prelude, release);
  awaken(link);  // what is ready has to ask for a slot now
}

// Keeps slots only for work that is there or announced.
void Sender::release_idle(Link& link) {
  const LinkWindows& windows = windows_[link.id];
  if (windows.open == 0 && windows.tickets == 0 && !windows.free.empty()) release(link);
}

void Sender::on_done(Link& link, const wire::Prelude& prelude, const wire::Done& done) {
  Request* request = find(prelude.request);
  if (request == nullptr || !request->failure.ok()) return;
  for (auto& lane : request->lanes) {
    if (lane.link.get() != &link || lane.epoch != prelude.epoch || lane.cancelled) continue;
    if (lane.remaining > 0 || lane.in_flight > 0 || lane.frames != done.frames || lane.bytes != done.payload_bytes) {
      fail(*request, Status::error(Code::kProtocol,
                                   link.config.name + ": the receiver says that it has " + std::to_string(done.frames) +
                                       " frames of " + std::to_string(done.payload_bytes) + " bytes, sent were " +
                                       std::to_string(lane.frames) + " of " + std::to_string(lane.bytes)));
      return;
    }
    lane.delivered = true;
  }
  conclude(*request);
}

void Sender::on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort) {
  const auto waiting = pending_.equal_range(prelude.request);
  for (auto at = waiting.first; at != waiting.second;) {
    at = at->second.link.get() == &link && at->second.epoch == prelude.epoch ? drop_ticket(at) : std::next(at);
  }
  release_idle(link);
  Request* request = find(prelude.request);
  if (request == nullptr) return;
  for (const auto& lane : request->lanes) {
    if (lane.link.get() == &link && lane.epoch == prelude.epoch && !lane.cancelled) {
      fail(*request, Status::error(abort.code, "the receiver gave the request up: " + abort.reason), &link);
      return;
    }
  }
}

}  // namespace hetkv::engine
