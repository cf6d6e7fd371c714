#include "transfers.h"

#include <algorithm>
#include <cstring>

#include "inspect.h"

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostTokens = 20;
constexpr std::uint64_t kGrace = 150 * kMs;  // from a deadline to the end that follows it: what is in flight ends first
constexpr int kAttempts = 100;

wire::Content content_of(std::uint64_t value) {
  wire::Content content{};
  content[0] = 1;
  std::memcpy(content.data() + 8, &value, sizeof value);
  return content;
}

}  // namespace

Transfers::Transfers(Fleet& fleet, const Profile& profile) : fleet_(fleet), world_(fleet.world), profile_(profile) {
  fleet_.on_event = [this](Process& process, const engine::Event& event) { on_event(process, event); };
  fleet_.on_death = [this](Process& process, bool orderly) { on_death(process, orderly); };
  fleet_.on_moved = [this](Process& process) {
    if (process.cache->disturbed()) world_.violate("a byte changed that no ticket covers");
  };
  fleet_.on_turn = [this](Process& process) {
    const std::string wrong = process.sends ? engine::Inspect::check(*process.sender)
                                            : engine::Inspect::check(*process.receiver);
    if (!wrong.empty()) world_.violate((process.sends ? "sender: " : "receiver: ") + wrong);
    if (process.cache->disturbed()) world_.violate("a byte changed that no ticket covers");
  };
}

std::vector<std::uint64_t> Transfers::by_group(std::uint64_t tokens) const {
  return std::vector<std::uint64_t>(fleet_.model.groups, tokens);
}

void Transfers::begin() {
  Random& random = world_.random;
  Transfer& transfer = *transfers_.emplace_back(std::make_unique<Transfer>());
  ++counts_.transfers;
  transfer.number = next_++;
  transfer.content = random.next();
  transfer.begun = world_.now();
  transfer.tokens = transfer.asked = random.between(1, kMostTokens);
  transfer.kept = random.chance(0.3) ? random.below(transfer.tokens + 1) : 0;
  transfer.lease_ms = static_cast<std::uint32_t>(random.between(6000, 9000));
  transfer.hold_ms = random.between(6000, 9000);
  if (!old_ids_.empty() && random.chance(0.2)) {
    const std::size_t at = random.below(old_ids_.size());
    transfer.id = old_ids_[at].first;
    transfer.may_fail = old_ids_[at].second;  // the sender may remember the failure
    old_ids_.erase(old_ids_.begin() + static_cast<std::ptrdiff_t>(at));
  } else {
    std::memcpy(transfer.id.data(), &transfer.number, sizeof transfer.number);
    transfer.id[15] = 1;
  }
  if (random.chance(0.3)) transfer.bound[0] = transfer.bound[1] = content_of(transfer.content);
  if (random.chance(profile_.unequal)) {
    transfer.may_fail = true;
    if (random.chance(0.5)) {
      transfer.asked += random.between(1, 3);
    } else {
      transfer.bound[random.below(2)] = content_of(random.next());
    }
  }
  if (random.chance(profile_.short_lease)) {
    transfer.may_fail = true;
    transfer.lease_ms = static_cast<std::uint32_t>(random.between(1, 40));
    if (random.chance(0.5)) transfer.hold_ms = random.between(1, 40);
  }
  for (const bool sends : {true, false}) {
    const int role = sends ? 0 : 1;
    transfer.instance[role] = static_cast<std::uint32_t>(random.below(fleet_.instances(sends)));
    for (std::uint32_t rank = 0; rank < fleet_.ranks(sends); ++rank) {
      Side& side = *transfer.sides[role].emplace_back(std::make_unique<Side>());
      side.transfer = &transfer;
      side.process = &fleet_.current(sends, transfer.instance[role], rank);
    }
  }
  world_.note("transfer {}: {} tokens from instance {} to {}", transfer.number, transfer.tokens, transfer.instance[0],
              transfer.instance[1]);
  plan(transfer, 0);
  if (random.chance(profile_.aborted)) {
    transfer.may_fail = true;
    Side& side = *transfer.sides[random.below(2)][0];
    world_.after(random.delay(40 * kMs), [this, &side] { abort(side); });
  }
}

// Each side begins at a time of its own, once there are blocks for all.
void Transfers::plan(Transfer& transfer, int attempts) {
  if (!reserve(transfer)) {
    if (attempts < kAttempts) {
      world_.after(world_.random.between(kMs, 50 * kMs), [this, &transfer, attempts] { plan(transfer, attempts + 1); });
      return;
    }
    for (const auto& sides : transfer.sides) {
      for (const auto& side : sides) never(*side);
    }
    return;
  }
  transfer.planned = true;
  transfer.begun = world_.now();
  for (int role = 0; role < 2; ++role) {
    for (const auto& side : transfer.sides[role]) {
      world_.after(world_.random.delay(20 * kMs), [this, role, at = side.get()] {
        fleet_.perform(*at->process, [this, role, at] { role == 0 ? begin_sender(*at) : begin_receiver(*at); });
      });
    }
  }
}

bool Transfers::reserve(Transfer& transfer) {
  bool all = true;
  for (int role = 0; role < 2; ++role) {
    for (const auto& side : transfer.sides[role]) {
      side->process = &fleet_.current(role == 0, transfer.instance[role], side->process->rank);
      if (!side->process->site.alive || side->process->site.paused) all = false;
      if (all) side->blocks = side->process->cache->take(by_group(role == 0 ? transfer.tokens : transfer.asked));
      all = all && !side->blocks.empty();
    }
  }
  if (all) return true;
  for (const auto& sides : transfer.sides) {
    for (const auto& side : sides) {
      if (!side->blocks.empty()) side->process->cache->give_back(std::exchange(side->blocks, {}));
    }
  }
  return false;
}

// --- the two sides

void Transfers::never(Side& side) {
  world_.note("transfer {}: never begins at process {}", side.transfer->number, side.process->site.id);
  side.ended = true;
  side.transfer->may_fail = true;
  release(side);
  finish(*side.transfer);
  // A router gives up what cannot be; not always at once.
  world_.after(world_.random.between(kMs, 100 * kMs), [this, &transfer = *side.transfer] {
    for (const auto& sides : transfer.sides) {
      for (const auto& other : sides) abort(*other);
    }
  });
}

void Transfers::abort(Side& side) {
  if (side.handle == 0 || side.ended) return;
  fleet_.perform(*side.process, [this, &side] {
    if (side.ended) return;
    world_.note("transfer {}: process {} aborts", side.transfer->number, side.process->site.id);
    if (side.process->sends) {
      side.process->sender->abort(side.handle, "simulated");
    } else {
      side.process->receiver->abort(side.handle, "simulated");
    }
  });
}

void Transfers::begin_sender(Side& side) {
  if (side.ended) return;
  Transfer& transfer = *side.transfer;
  Process& process = *side.process;
  side.begun = world_.now();
  engine::Submission submission;
  submission.id = transfer.id;
  submission.tokens.assign(fleet_.model.groups, {0, transfer.tokens});
  submission.blocks = side.blocks;
  submission.hold_ms = transfer.hold_ms;
  submission.content = transfer.bound[0];
  side.handle = process.sender->submit(std::move(submission));
  by_handle_[{&process, side.handle}] = &side;
  fleet_.wake(process);
  expect_end(side, transfer.hold_ms * kMs);
  compute(side);
}

// The prefill: in chunks of tokens, layer by layer.
void Transfers::compute(Side& side) {
  Random& random = world_.random;
  const std::uint64_t tokens = side.transfer->tokens;
  const std::uint64_t chunks = random.chance(0.3) ? random.between(1, std::min<std::uint64_t>(tokens, 3)) : 1;
  std::uint64_t time = world_.now();
  for (std::uint64_t chunk = 0; chunk < chunks; ++chunk) {
    const wire::TokenRange range{tokens * chunk / chunks, tokens * (chunk + 1) / chunks};
    for (std::uint32_t layer = 0; layer < fleet_.model.layers; ++layer) {
      time += random.delay(5 * kMs);
      world_.at(time, [this, &side, range, layer] {
        fleet_.perform(*side.process, [this, &side, range, layer] {
          if (side.ended || side.packed) return;
          side.process->cache->compute(side.transfer->content, layer, range, side.blocks);
          auto batch = std::make_shared<engine::SendBatch>();
          batch->handles = {side.handle};
          batch->tokens.assign(fleet_.model.groups, {range});
          side.process->sender->send_layers(batch, {{layer, fleet_.model.group_of(layer)}});
        });
      });
    }
  }
}

void Transfers::begin_receiver(Side& side) {
  if (side.ended) return;
  Transfer& transfer = *side.transfer;
  Process& process = *side.process;
  std::vector<std::uint32_t> links;
  for (const auto& sender : transfer.sides[0]) {
    if (!Fleet::share_heads(*sender->process, process)) continue;
    const Control* control = fleet_.link(*sender->process, process, 1);
    if (control == nullptr) return never(side);
    links.push_back(control->id[1]);
  }
  side.begun = world_.now();
  side.arrived.assign(fleet_.model.layers, false);
  engine::Intake intake;
  intake.id = transfer.id;
  intake.want.assign(fleet_.model.groups, want(transfer));
  intake.blocks = side.blocks;
  intake.links = std::move(links);
  intake.lease_ms = transfer.lease_ms;
  intake.content = transfer.bound[1];
  for (std::uint32_t group = 0; group < fleet_.model.groups; ++group) {
    process.cache->open(want(transfer), group, side.blocks);
  }
  side.handle = process.receiver->receive(std::move(intake));
  by_handle_[{&process, side.handle}] = &side;
  fleet_.wake(process);
  expect_end(side, transfer.lease_ms * kMs);
}

// Every request ends by its deadline, as soon as what is in flight for it has.
void Transfers::expect_end(Side& side, std::uint64_t within) {
  world_.after(within + kGrace, [this, &side] {
    if (side.ended || !side.process->site.alive) return;
    if (side.process->site.paused || side.process->disturbed_until + kGrace > world_.now()) {
      return expect_end(side, 0);
    }
    world_.violate("transfer " + std::to_string(side.transfer->number) + " has not ended at process " +
                   std::to_string(side.process->site.id) + " by its deadline");
  });
}

// --- what engines say

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

void Transfers::on_send_event(Side& side, const engine::Event& event) {
  if (event.kind == engine::EventKind::kPacked) {
    if (side.packed) world_.violate("a request is packed twice");
    side.packed = true;
    return release(side);
  }
  if (event.kind != engine::EventKind::kComplete) return world_.violate("an event that a sender does not have");
  if (!side.packed) world_.violate("a request is complete before it is packed");
  side.ended = side.complete = true;
  for (const auto& receiver : side.transfer->sides[1]) {
    const bool served = Fleet::share_heads(*side.process, *receiver->process) && side.transfer->sides[0].size() == 1;
    if (!served || !receiver->process->site.alive || (receiver->ended && !receiver->complete)) continue;
    const bool all = std::all_of(receiver->arrived.begin(), receiver->arrived.end(), [](bool at) { return at; });
    if (receiver->handle == 0 || !all) {
      // Told by the engine in the same turn as it told the sender, and taken from its queue by now.
      if (!receiver->process->site.paused) world_.violate("a sender is told complete before its receiver is");
    }
  }
  finish(*side.transfer);
}

void Transfers::on_receive_event(Side& side, const engine::Event& event) {
  Transfer& transfer = *side.transfer;
  Cache& cache = *side.process->cache;
  if (event.kind == engine::EventKind::kLayer) {
    const auto layer = static_cast<std::uint32_t>(event.layer);
    if (layer >= side.arrived.size() || side.arrived[layer]) return world_.violate("a layer arrives twice, or none");
    side.arrived[layer] = true;
    ++counts_.layers;
    counts_.bytes += want(transfer).stop - want(transfer).start;
    if (!cache.arrived(transfer.content, layer, want(transfer), side.blocks)) {
      world_.violate("transfer " + std::to_string(transfer.number) + ": layer " + std::to_string(layer) +
                     " is reported but is not what was sent");
    }
    return;
  }
  if (event.kind != engine::EventKind::kComplete) return world_.violate("an event that a receiver does not have");
  side.ended = side.complete = true;
  for (std::uint32_t layer = 0; layer < fleet_.model.layers; ++layer) {
    if (!side.arrived[layer] || !cache.holds(transfer.content, layer, want(transfer), side.blocks)) {
      world_.violate("transfer " + std::to_string(transfer.number) + " is complete without layer " +
                     std::to_string(layer));
    }
  }
  world_.after(world_.random.delay(50 * kMs), [this, &side] {  // the decode; nothing may change meanwhile
    if (side.process->site.alive) release(side);
  });
  finish(transfer);
}

void Transfers::on_failed(Side& side, const engine::Event& event) {
  Transfer& transfer = *side.transfer;
  side.ended = true;
  if (event.status.ok()) world_.violate("a request failed without a status");
  if (!excused(transfer)) {
    world_.violate("transfer " + std::to_string(transfer.number) + " failed for no reason: " + event.status.detail);
  }
  transfer.may_fail = true;
  release(side);
  finish(transfer);
}

bool Transfers::excused(const Transfer& transfer) const {
  if (transfer.may_fail) return true;
  for (const auto& sides : transfer.sides) {
    for (const auto& side : sides) {
      if (!side->process->site.alive) return true;
      if (side->process->disturbed_until > 0 && side->process->disturbed_until + fleet_.recovery() >= transfer.begun) {
        return true;
      }
    }
  }
  return false;
}

void Transfers::on_death(Process& process, bool orderly) {
  for (const auto& transfer : transfers_) {
    for (const auto& sides : transfer->sides) {
      for (const auto& side : sides) {
        if (side->process != &process || side->ended || !transfer->planned) continue;
        if (orderly && side->handle != 0) world_.violate("a request did not end with its engine");
        side->ended = true;
        transfer->may_fail = true;
        finish(*transfer);
      }
    }
  }
}

void Transfers::release(Side& side) {
  if (side.blocks.empty()) return;
  Cache& cache = *side.process->cache;
  if (!side.process->sends) {
    for (std::uint32_t group = 0; group < fleet_.model.groups; ++group) {
      cache.shut(want(*side.transfer), group, side.blocks);
    }
    for (std::uint32_t layer = 0; side.complete && layer < fleet_.model.layers; ++layer) {
      if (!cache.holds(side.transfer->content, layer, want(*side.transfer), side.blocks)) {
        world_.violate("a layer changed after it was complete");
      }
    }
  }
  cache.give_back(std::exchange(side.blocks, {}));
}

void Transfers::finish(Transfer& transfer) {
  if (transfer.counted) return;
  bool complete = true;
  bool begun = true;
  for (const auto& sides : transfer.sides) {
    for (const auto& side : sides) {
      if (!side->ended) return;
      complete = complete && side->complete;
      begun = begun && side->handle != 0;
    }
  }
  transfer.counted = true;
  ++(complete ? counts_.complete : begun ? counts_.failed : counts_.unbegun);
  old_ids_.emplace_back(transfer.id, !complete);
}

std::string Transfers::open() const {
  std::string text;
  for (const auto& transfer : transfers_) {
    for (const auto& sides : transfer->sides) {
      for (const auto& side : sides) {
        if (side->ended && (side->blocks.empty() || !side->process->site.alive)) continue;
        text += " transfer " + std::to_string(transfer->number) + " at process " +
                std::to_string(side->process->site.id) + (side->ended ? " has blocks" : "") +
                (side->handle == 0 ? " has not begun" : "") + ";";
      }
    }
  }
  return text;
}

}  // namespace hetkv::sim
