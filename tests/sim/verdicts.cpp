// What engines tell of requests, and what follows where it is not so.
#include <algorithm>

#include "inspect.h"
#include "transfers.h"

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kGrace = 150 * kMs;  // from a deadline to the end that follows it: what is in flight ends first
constexpr std::uint64_t kPrompt = 700 * kMs;  // from a failure to the end on all sides that have begun

constexpr std::uint64_t kSettled = 25 * kMs;  // from when a side begins to when its peers know of it

std::string name(const Transfer& transfer) {
  return "transfer " + std::to_string(transfer.number);
}

}  // namespace

Transfers::Transfers(Fleet& fleet, const Profile& profile) : fleet_(fleet), world_(fleet.world), profile_(profile) {
  fleet_.on_event = [this](Process& process, const engine::Event& event) { on_event(process, event); };
  fleet_.on_death = [this](Process& process, bool orderly) { on_death(process, orderly); };
  fleet_.on_moved = [this](Process& process) {
    if (process.cache->disturbed()) world_.violate("a byte changed that no ticket covers");
  };
  fleet_.on_turn = [this](Process& process) {
    const std::string wrong =
        process.sends ? engine::Inspect::check(*process.sender) : engine::Inspect::check(*process.receiver);
    if (!wrong.empty()) world_.violate((process.sends ? "sender: " : "receiver: ") + wrong);
    if (process.cache->disturbed()) world_.violate("a byte changed that no ticket covers");
  };
}

std::string Transfers::open() const {
  std::string text;
  for (const auto& transfer : transfers_) {
    for (const auto& sides : transfer->sides) {
      for (const auto& side : sides) {
        if (side->ended && (side->blocks.empty() || !side->process->site.alive)) continue;
        text += " " + name(*transfer) + " of rank " + std::to_string(side->rank) + (side->ended ? " has blocks" : "") +
                (side->outcome == nullptr ? " has not begun" : "") + ";";
      }
    }
  }
  return text;
}

// Every request ends by its deadline, as soon as what is in flight for it has.
void Transfers::expect_end(Side& side, std::uint64_t within) {
  world_.after(within + kGrace, [this, &side] {
    if (side.ended || !side.process->site.alive) return;
    const bool late = profile_.slow_move > 0 && !side.process->mover->idle();
    if (late || side.process->site.paused || side.process->disturbed_until + kGrace > world_.now())
      return expect_end(side, 0);
    world_.violate(name(*side.transfer) + " has not ended at process " + std::to_string(side.process->site.id) +
                   " by its deadline");
  });
}

// Where nothing else goes wrong the failure of one side reaches all others that have begun.
void Transfers::expect_all_ended(const Transfer& transfer) {
  if (!profile_.calm() || !fleet_.network.faults || transfer.follows) return;
  if (transfer.sides[0].size() > 1 && transfer.sides[1].size() > 1) return;  // not all of them have links
  const auto all_begun = [&] {
    for (const auto& sides : transfer.sides) {
      for (const auto& side : sides) {
        if (side->outcome == nullptr || side->begun + kSettled > world_.now()) return false;
      }
    }
    return true;
  };
  if (!all_begun()) return;
  world_.after(kPrompt, [this, &transfer] {
    if (transfer.followed) return;
    for (const auto& sides : transfer.sides) {
      for (const auto& side : sides) {
        if (!side->ended) world_.violate(name(transfer) + " failed, and one side does not learn of it");
      }
    }
  });
}

void Transfers::on_event(Process& process, const engine::Event& event) {
  const auto found = by_handle_.find({&process, event.handle});
  if (found == by_handle_.end()) return world_.violate("an event of a request that nobody began");
  Side& side = *found->second;
  world_.note("transfer {}: event {} of layer {} at process {}", side.transfer->number,
              static_cast<std::uint64_t>(event.kind), static_cast<std::uint64_t>(event.layer + 1), process.site.id);
  if (side.ended) return world_.violate("an event of a request that has ended");
  if (event.kind == engine::EventKind::kFailed) return on_failed(side, event);
  process.sends ? on_send_event(side, event) : on_receive_event(side, event);
}

// Whether the receiver may be complete for the sender by an earlier request under the same id: that one asked for
// nothing there and was complete at once, and its ticket waits, within its lease, for the next `send` of the id, as the
// ticket of a receiver that begins first does. No message distinguishes the two. A ticket of this attempt that comes
// before the `send` takes its place (tests/transport/test_lifecycle.py).
bool Transfers::asked_before(const Side& sender, const Side& receiver) const {
  for (const auto& before : transfers_) {
    if (before.get() == sender.transfer || before->id != sender.transfer->id) continue;
    if (before->want().start < before->want().stop) continue;
    for (const auto& side : before->sides[1]) {
      const std::uint64_t until = side->begun + before->lease_ms * kMs + fleet_.recovery();
      if (side->complete && side->process == receiver.process && sender.begun <= until) return true;
    }
  }
  return false;
}

void Transfers::on_send_event(Side& side, const engine::Event& event) {
  if (event.kind == engine::EventKind::kPacked) {
    if (side.packed) world_.violate("a request is packed twice");
    side.packed = true;
    return release(side);
  }
  if (event.kind != engine::EventKind::kComplete) return world_.violate("an event that a sender does not have");
  Transfer& transfer = *side.transfer;
  const bool early = std::any_of(transfer.sides[1].begin(), transfer.sides[1].end(),
                                 [&](const auto& receiver) { return asked_before(side, *receiver); });
  if (!side.packed) world_.violate("a request is complete before it is packed");
  if (transfer.must_fail && !early)
    world_.violate(name(transfer) + " is complete though its sides mean different things");
  side.complete = true;
  for (const auto& receiver : transfer.sides[1]) {
    if (transfer.sides[0].size() > 1 || transfer.followed || transfer.follows ||
        (receiver->ended && !receiver->complete))
      continue;
    if (receiver->process == nullptr || !receiver->process->site.alive || receiver->process->site.paused) continue;
    const bool all = std::all_of(receiver->arrived.begin(), receiver->arrived.end(), [](bool at) { return at; });
    if (receiver->outcome != nullptr && all) continue;
    if (!asked_before(side, *receiver)) world_.violate("a sender has complete before its receiver is");
    transfer.may_fail = true;  // its ticket waits in vain
  }
  end(side);
}

void Transfers::on_receive_event(Side& side, const engine::Event& event) {
  const Transfer& transfer = *side.transfer;
  Cache& cache = *side.process->cache;
  if (event.kind == engine::EventKind::kLayer) {
    const auto layer = static_cast<std::uint32_t>(event.layer);
    if (layer >= side.arrived.size() || side.arrived[layer]) return world_.violate("a layer arrives twice, or none");
    side.arrived[layer] = true;
    ++counts_.layers;
    if (!cache.arrived(transfer.content, layer, transfer.want(), side.blocks)) {
      world_.violate(name(transfer) + ": layer " + std::to_string(layer) + " is reported but is not what was sent");
    }
    return;
  }
  if (event.kind != engine::EventKind::kComplete) return world_.violate("an event that a receiver does not have");
  side.complete = true;
  if (transfer.must_fail && transfer.want().start < transfer.want().stop) {
    world_.violate(name(transfer) + " is complete though its sides mean different things");
  }
  for (std::uint32_t layer = 0; layer < fleet_.model.layers; ++layer) {
    if (!side.arrived[layer] || !cache.holds(transfer.content, layer, transfer.want(), side.blocks)) {
      world_.violate(name(transfer) + " is complete without layer " + std::to_string(layer));
    }
  }
  world_.after(world_.random.delay(50 * kMs), [this, &side] {  // the decode; nothing may change meanwhile
    if (side.process->site.alive) release(side);
  });
  end(side);
}

void Transfers::on_failed(Side& side, const engine::Event& event) {
  Transfer& transfer = *side.transfer;
  if (event.status.ok()) world_.violate("a request failed without a status");
  if (!excused(transfer)) world_.violate(name(transfer) + " failed for no reason: " + event.status.detail);
  transfer.may_fail = true;
  expect_all_ended(transfer);
  release(side);
  const bool again =
      !side.process->sends && !transfer.followed && fleet_.network.faults && world_.random.chance(profile_.again);
  transfer.followed |= again;
  end(side);
  if (again) follow(transfer);
}

bool Transfers::excused(const Transfer& transfer) const {
  if (transfer.may_fail) return true;
  for (const auto& sides : transfer.sides) {
    for (const auto& side : sides) {
      if (side->process == nullptr || fleet_.disturbed(*side->process, transfer.begun)) return true;
    }
  }
  for (const auto& sender : transfer.sides[0]) {
    for (const auto& receiver : transfer.sides[1]) {
      if (fleet_.disturbed(*sender->process, *receiver->process, transfer.begun)) return true;
    }
  }
  return false;
}

void Transfers::on_death(Process& process, bool orderly) {
  for (std::size_t i = 0; i < transfers_.size(); ++i) {
    Transfer& transfer = *transfers_[i];
    for (const auto& sides : transfer.sides) {
      for (const auto& side : sides) {
        if (side->process != &process || side->ended) continue;
        if (orderly && side->outcome != nullptr) world_.violate("a request did not end with its engine");
        transfer.may_fail = true;
        end(*side);
      }
    }
  }
}

void Transfers::release(Side& side) {
  if (side.blocks.empty()) return;
  const Transfer& transfer = *side.transfer;
  Cache& cache = *side.process->cache;
  if (!side.process->sends) {
    for (std::uint32_t group = 0; group < fleet_.model.groups; ++group) {
      cache.shut(transfer.want(), group, side.blocks);
    }
    for (std::uint32_t layer = 0; side.complete && layer < fleet_.model.layers; ++layer) {
      if (!cache.holds(transfer.content, layer, transfer.want(), side.blocks)) {
        world_.violate("a layer changed after it was complete");
      }
    }
  }
  cache.give_back(std::exchange(side.blocks, {}));
}

void Transfers::end(Side& side) {
  side.ended = true;
  if (side.then) std::exchange(side.then, {})();
  Transfer& transfer = *side.transfer;
  bool complete = true;
  bool begun = true;
  for (const auto& sides : transfer.sides) {
    for (const auto& at : sides) {
      if (!at->ended) return;
      complete = complete && at->complete;
      begun = begun && at->outcome != nullptr;
    }
  }
  if (std::exchange(transfer.counted, true)) return;
  ++(complete ? counts_.complete : begun ? counts_.failed : counts_.unbegun);
  if (!transfer.followed) old_ids_.emplace_back(transfer.id, transfer.may_fail);
}

}  // namespace hetkv::sim
