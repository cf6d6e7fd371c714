// The links of an engine: added, activated, watched, lost, closed; and what is sent on them.
#include <algorithm>
#include <utility>

#include "engine/engine.h"

namespace hetkv::engine {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kLookNs = 200'000;  // how late the end of a link may be seen
constexpr std::uint64_t kStopMs = 2000;
constexpr std::uint64_t kFarewellMs = 100;  // how long a goodbye may take to leave

std::string silence(std::uint64_t ns) {
  return "no message from the peer for " + std::to_string(ns / kMs) + " ms: it stopped, or the network did";
}

}  // namespace

Status Engine::add_link(LinkConfig config, std::uint32_t* id) {
  Status result = Status::error(Code::kClosed, "the engine is closed");
  for (const auto& plan : config.plans) {
    if (plan.segments.empty() || plan.segments.size() > wire::kMaxSegments || plan.heads() < 1) {
      return Status::error(
          Code::kInvalid, "layer " + std::to_string(plan.layer) + " has no heads, or segments that do not fit a frame");
    }
    const bool finds = !plan.fills.empty() ||
                       std::any_of(plan.segments.begin(), plan.segments.end(),
                                   [](const SegmentPlan& segment) { return segment.pool_scales.map.base != 0; });
    const bool travel =
        plan.scale_encoding != 0 || std::any_of(plan.segments.begin(), plan.segments.end(),
                                                [](const SegmentPlan& segment) { return segment.wire_scales >= 0; });
    if ((finds || travel) && device_ != nullptr && !config_.device_scales) {
      return Status::error(Code::kUnsupported, "layer " + std::to_string(plan.layer) +
                                                   " has scales per token or head in its blocks; a pool on a device "
                                                   "has static scales, or none");
    }
    if (finds && device_ != nullptr) {
      return Status::error(Code::kUnsupported, "layer " + std::to_string(plan.layer) +
                                                   " has scales in its blocks that would be found anew, or filled in, "
                                                   "from what arrives; on a device they are copied only");
    }
    if (const std::uint64_t need = plan.payload_bytes(1); need > config_.slot_bytes) {
      return Status::error(Code::kInvalid, "slot_bytes is " + std::to_string(config_.slot_bytes) +
                                               ", but one token of layer " + std::to_string(plan.layer) +
                                               " has a frame of " + std::to_string(need) + " bytes");
    }
  }
  const codec::ValuesMask coded = config.coding.accept | codec::mask_of(config.coding.values);
  if ((coded & codec::kZstdValues) != 0 && !codec::has_zstd()) {
    return Status::error(Code::kUnsupported, "there is no libzstd here, which the link's codec needs");
  }
  std::stable_sort(config.plans.begin(), config.plans.end(),
                   [](const auto& a, const auto& b) { return a.layer < b.layer; });
  call([&] {
    if (numbers_.count(config.number) != 0) {
      result = Status::error(Code::kInvalid, "a link of this number exists");
      return;
    }
    auto made = std::make_shared<Link>(next_link_, std::move(config));
    const LinkConfig& settings = made->config;
    result =
        transport_->connect({settings.number, settings.address, settings.streams, settings.coding}, &made->endpoint);
    if (!result.ok()) return;
    *id = next_link_++;
    numbers_[made->config.number] = made.get();
    links_.emplace(*id, std::move(made));
  });
  return result;
}

void Engine::activate_link(std::uint32_t id) {
  post([this, id] {
    const auto at = link(id);
    if (at == nullptr || at->state == LinkState::kDraining) {  // whoever did not know the link yet when it was lost
      events_.push({EventKind::kLinkLost, 0, id, -1, Status::error(Code::kPeerLost, "the link was lost at once")});
      if (at == nullptr) events_.push({EventKind::kLinkDrained, 0, id, -1, {}});
      return;
    }
    if (at->state != LinkState::kOpening) return;
    at->state = LinkState::kUp;
    at->heard_ns = now_ns();
    on_link_up(*at);
  });
}

void Engine::drop_link(std::uint32_t id, Status status) {
  post([this, id, status = std::move(status)] {
    // What the peer said before it ended counts: that a request is verified, above all.
    for (int i = 0; i < kProgressBurst && transport_->progress(); ++i) {
    }
    drain_messages();
    if (const auto at = link(id)) lose(*at, status);
  });
}

std::shared_ptr<Link> Engine::link(std::uint32_t id) const {
  const auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second;
}

void Engine::send(Link& link, wire::Prelude prelude) {
  std::vector<std::uint8_t> message;
  prelude.sequence = link.send_sequence++;
  wire::encode(prelude, link.config.send_key, message);
  transmit(link, std::move(message));
}

void Engine::transmit(Link& link, std::vector<std::uint8_t> message) {
  link.sent_ns = now_ns();
  link.endpoint->send(std::move(message));
}

void Engine::inject(std::uint32_t id, std::vector<std::uint8_t> bytes) {
  post([this, id, bytes = std::move(bytes)]() mutable {
    const auto at = link(id);
    if (at == nullptr || !at->up()) return;
    ++at->send_sequence;
    at->endpoint->send(std::move(bytes));
  });
}

std::uint64_t Engine::next_sequence(std::uint32_t id) {
  std::uint64_t sequence = 0;
  call([&] {
    if (const auto at = link(id)) sequence = at->send_sequence;
  });
  return sequence;
}

// Walks all links while one is closing, and else once in kLookNs, or where that is `due`.
bool Engine::check_links(std::uint64_t now, bool due) {
  if (threaded_ && draining_ == 0 && !due && now - checked_ns_ < kLookNs) return false;
  checked_ns_ = now;
  bool moved = false;
  for (auto next = links_.begin(); next != links_.end();) {
    const auto here = next++;
    Link& at = *here->second;
    if (at.state == LinkState::kDraining) {
      if (!may_close(at, now)) continue;
      at.endpoint->close();
      if (!at.endpoint->closed() || !link_idle(at)) continue;
      at.state = LinkState::kGone;
      on_link_closed(at);
      at.endpoint.reset();
      events_.push({EventKind::kLinkDrained, 0, at.id, -1, {}});
      numbers_.erase(at.config.number);
      links_.erase(here);
      --draining_;
      moved = true;
    } else if (!at.endpoint->failure().ok()) {
      lose(at, at.endpoint->failure());
      moved = true;
    } else if (at.up()) {
      const std::uint64_t patience = (std::uint64_t{config_.peer_timeout_ms} + at.config.frame_ms) * kMs;
      if (now > at.heard_ns && now - at.heard_ns > patience) {
        lose(at, Status::error(Code::kPeerLost, silence(now - at.heard_ns)));
        moved = true;
      } else if (now - at.sent_ns >= config_.heartbeat_ms * kMs && now > at.sent_ns) {
        wire::Prelude prelude;
        prelude.type = wire::Type::kHeartbeat;
        send(at, prelude, wire::Heartbeat{now});
      }
    }
  }
  return moved;
}

void Engine::lose(Link& link, const Status& status, bool tell) {
  if (link.state == LinkState::kDraining || link.state == LinkState::kGone) return;
  if (tell && link.up() && link.endpoint->failure().ok()) {  // so that the peer need not wait for the heartbeat's end
    wire::Prelude prelude;
    prelude.type = wire::Type::kBye;
    send(link, prelude);
    link.farewell = true;
  }
  link.state = LinkState::kDraining;
  ++draining_;
  link.lost_ns = now_ns();
  on_link_lost(link, status);
  events_.push({EventKind::kLinkLost, 0, link.id, -1, status});
}

// No kernel of this side stores into the peer's memory, and the goodbye has left or has had its time.
bool Engine::may_close(const Link& link, std::uint64_t now) const {
  return link_drained(link) && (!link.farewell || link.endpoint->drained() || now > link.lost_ns + kFarewellMs * kMs ||
                                !link.endpoint->failure().ok());
}

void Engine::close_all(const Status& status) {
  for (auto& [id, at] : links_) lose(*at, status);
  on_stop(status);
  // Every operation must have ended before the memory under it goes; force-closed endpoints end them at once.
  const std::uint64_t limit = now_ns() + kStopMs * kMs;
  while ((!links_.empty() || busy()) && now_ns() < limit) {
    const bool moved = transport_->progress();
    const std::uint64_t now = now_ns();
    step(now);
    check_links(now);
    if (!moved) std::this_thread::yield();
  }
  mover_->drain();  // no kernel runs on memory that goes back now
  step(now_ns());
  for (auto& [id, at] : links_) on_link_closed(*at);  // where an operation did not end in time
  transport_->close();  // it does now, while all that the operations refer to still exists
  step(now_ns());       // and what had to wait for them ends
  numbers_.clear();
  links_.clear();
  incoming_.clear();
}

}  // namespace hetkv::engine
