#include "transfers.h"

#include <algorithm>
#include <cstring>

#include "inspect.h"

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostTokens = 20;
constexpr std::uint64_t kNoticed = 60 * kMs;  // from when a side begins to when all know what the others mean
constexpr int kAttempts = 100;                // to find blocks on both sides

wire::Content content_of(std::uint64_t value) {
  wire::Content content{};
  content[0] = 1;
  std::memcpy(content.data() + 8, &value, sizeof value);
  return content;
}

}  // namespace

std::vector<std::uint64_t> Transfers::by_group(std::uint64_t tokens) const {
  return std::vector<std::uint64_t>(fleet_.model.groups, tokens);
}

// A transfer of random shape between random instances.
Transfer& Transfers::draw() {
  Random& random = world_.random;
  Transfer& transfer = *transfers_.emplace_back(std::make_unique<Transfer>());
  ++counts_.transfers;
  transfer.number = next_++;
  transfer.content = random.next();
  transfer.tokens = transfer.asked = random.between(1, kMostTokens);
  transfer.kept = random.chance(0.3) ? random.below(transfer.tokens + 1) : 0;
  transfer.lease_ms = static_cast<std::uint32_t>(random.between(6000, 9000));
  transfer.hold_ms = random.between(6000, 9000);
  std::memcpy(transfer.id.data(), &transfer.number, sizeof transfer.number);
  transfer.id[15] = 1;
  if (random.chance(profile_.again > 0 ? 0.6 : 0.3))
    transfer.bound[0] = transfer.bound[1] = content_of(transfer.content);
  if (random.chance(profile_.unequal)) {
    transfer.may_fail = transfer.must_fail = true;
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
  if (random.chance(profile_.stalled)) {
    transfer.may_fail = transfer.stalled = true;
    transfer.lease_ms = 15'000;
    transfer.hold_ms = 15'000;
  }
  for (const bool sends : {true, false}) {
    const int role = sends ? 0 : 1;
    transfer.instance[role] = static_cast<std::uint32_t>(random.below(fleet_.instances(sends)));
    for (std::uint32_t rank = 0; rank < fleet_.ranks(sends); ++rank) {
      Side& side = *transfer.sides[role].emplace_back(std::make_unique<Side>());
      side.transfer = &transfer;
      side.rank = rank;
    }
  }
  return transfer;
}

void Transfers::begin() {
  Random& random = world_.random;
  Transfer& transfer = draw();
  if (!old_ids_.empty() && random.chance(0.2)) {
    const std::size_t at = random.below(old_ids_.size());
    transfer.id = old_ids_[at].first;
    transfer.may_fail |= old_ids_[at].second;  // the sender may remember the failure
    std::uint64_t old = 0;
    std::memcpy(&old, transfer.id.data(), sizeof old);
    world_.note("transfer {}: under the id of transfer {}", transfer.number, old);
    old_ids_.erase(old_ids_.begin() + static_cast<std::ptrdiff_t>(at));
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
  for (int role = 0; role < 2; ++role) {
    for (const auto& side : transfer.sides[role]) {
      world_.after(world_.random.delay(20 * kMs), [this, role, at = side.get()] {
        fleet_.perform(*at->process, [this, role, at] { role == 0 ? begin_sender(*at) : begin_receiver(*at); });
      });
    }
  }
}

bool Transfers::reserve(Transfer& transfer) {
  std::vector<std::pair<Process*, Blocks>> found;
  for (int role = 0; role < 2; ++role) {
    for (const auto& side : transfer.sides[role]) {
      Process& process = fleet_.current(role == 0, transfer.instance[role], side->rank);
      Blocks blocks;
      if (process.site.alive && !process.site.paused) {
        blocks = process.cache->take(by_group(role == 0 ? transfer.tokens : transfer.asked));
      }
      if (blocks.empty()) {
        for (auto& [owner, taken] : found) owner->cache->give_back(taken);
        return false;
      }
      found.emplace_back(&process, std::move(blocks));
    }
  }
  std::size_t at = 0;
  for (const auto& sides : transfer.sides) {
    for (const auto& side : sides) std::tie(side->process, side->blocks) = std::move(found[at++]);
  }
  return true;
}

// The receivers ask again under the same id, at once; the senders follow when they have ended. Frames of the first
// attempt are still on their way.
void Transfers::follow(Transfer& before) {
  Transfer& transfer = draw();
  ++counts_.again;
  transfer.id = before.id;
  transfer.may_fail = transfer.follows = true;
  before.must_fail = transfer.must_fail = false;
  // Either the same KV, or another one that both attempts name: only then can the sides distinguish them.
  if (before.bound[0] && before.bound[0] == before.bound[1] && world_.random.chance(0.7)) {
    transfer.asked = transfer.tokens;
    transfer.bound[0] = transfer.bound[1] = content_of(transfer.content);
  } else {
    transfer.content = before.content;
    transfer.tokens = transfer.asked = before.tokens;
    transfer.kept = std::min(before.kept, before.tokens);
    transfer.bound[0] = transfer.bound[1] = before.bound[0];
  }
  std::copy(std::begin(before.instance), std::end(before.instance), std::begin(transfer.instance));
  world_.note("transfer {}: again, as transfer {}, {} tokens", before.number, transfer.number, transfer.tokens);
  world_.after(world_.random.between(kMs, 200 * kMs), [this, &before] {  // the router gives the first one up
    for (const auto& sides : before.sides) {
      for (const auto& side : sides) abort(*side);
    }
  });
  for (int role = 0; role < 2; ++role) {
    for (std::size_t rank = 0; rank < transfer.sides[role].size(); ++rank) {
      Side& side = *transfer.sides[role][rank];
      auto go = [this, role, &side, &transfer] {
        world_.after(world_.random.delay(2 * kMs), [this, role, &side, &transfer] {
          Process& process = fleet_.current(role == 0, transfer.instance[role], side.rank);
          side.process = &process;
          if (!process.site.alive) return never(side);
          fleet_.perform(process, [this, role, &side, &transfer] {
            if (side.ended) return;
            side.blocks = side.process->cache->take(by_group(role == 0 ? transfer.tokens : transfer.asked));
            if (side.blocks.empty()) return never(side);
            role == 0 ? begin_sender(side) : begin_receiver(side);
          });
        });
      };
      Side& last = *before.sides[role][rank];
      if (last.ended) {
        go();
      } else {
        last.then = go;
      }
    }
  }
}

void Transfers::never(Side& side) {
  if (side.ended) return;
  world_.note("transfer {}: a side never begins", side.transfer->number);
  side.transfer->may_fail = true;
  release(side);
  end(side);
  // A router gives up what cannot be; not always at once.
  world_.after(world_.random.between(kMs, 100 * kMs), [this, &transfer = *side.transfer] {
    for (const auto& sides : transfer.sides) {
      for (const auto& other : sides) abort(*other);
    }
  });
}

void Transfers::abort(Side& side) {
  if (side.outcome == nullptr || side.ended) return;
  fleet_.perform(*side.process, [this, &side] {
    if (side.ended) return;
    world_.note("transfer {}: process {} aborts", side.transfer->number, side.process->site.id);
    if (side.process->sends) {
      side.process->sender->abort(side.outcome->handle, "simulated");
    } else {
      side.process->receiver->abort(side.outcome->handle, "simulated");
    }
  });
}

void Transfers::begin_sender(Side& side) {
  if (side.ended) return;
  const Transfer& transfer = *side.transfer;
  engine::Submission submission;
  submission.id = transfer.id;
  submission.tokens.assign(fleet_.model.groups, {0, transfer.tokens});
  submission.blocks = side.blocks;
  submission.hold_ms = transfer.hold_ms;
  submission.content = transfer.bound[0];
  std::shared_ptr<engine::Outcome> outcome;
  if (!side.process->sender->submit(std::move(submission), &outcome).ok()) return never(side);
  begun(side, std::move(outcome), transfer.hold_ms * kMs);
  compute(side);
}

void Transfers::begun(Side& side, std::shared_ptr<engine::Outcome> outcome, std::uint64_t within) {
  world_.note("transfer {}: begins at process {}, handle {}", side.transfer->number, side.process->site.id,
              outcome->handle);
  side.begun = world_.now();
  side.transfer->begun = std::min(side.transfer->begun, side.begun);
  outcome->watch(engine::Outcome::kWatchEvents);
  by_handle_[{side.process, outcome->handle}] = &side;
  side.outcome = std::move(outcome);
  fleet_.wake(*side.process);
  expect_end(side, within);
  // One that begins after the others have failed hears of it at the end of its hold time.
  bool waits = false;
  for (const auto& sides : side.transfer->sides) {
    for (const auto& other : sides) waits |= other->ended || other->outcome == nullptr;
  }
  if (waits || !side.transfer->must_fail) return;
  world_.after(kNoticed, [this, &transfer = *side.transfer] {
    if (transfer.must_fail) expect_all_ended(transfer);
  });
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
      if (side.transfer->stalled && chunk + 1 == chunks && layer + 1 == fleet_.model.layers) continue;
      world_.at(time, [this, &side, range, layer] {
        fleet_.perform(*side.process, [this, &side, range, layer] {
          if (side.ended || side.packed) return;
          side.process->cache->compute(side.transfer->content, layer, range, side.blocks);
          auto batch = std::make_shared<engine::SendBatch>();
          batch->handles = {side.outcome->handle};
          batch->tokens.assign(fleet_.model.groups, {range});
          side.process->sender->send_batch(batch, static_cast<std::int32_t>(layer));
        });
      });
    }
  }
}

void Transfers::begin_receiver(Side& side) {
  if (side.ended) return;
  const Transfer& transfer = *side.transfer;
  Process& process = *side.process;
  engine::Intake intake;
  for (std::uint32_t rank = 0; rank < fleet_.ranks(true); ++rank) {
    const Process& sender = fleet_.current(true, transfer.instance[0], rank);
    if (!Fleet::share_heads(sender, process)) continue;
    const Control* control = fleet_.link(sender, process, 1);
    if (control == nullptr) return never(side);
    intake.links.push_back(control->id[1]);
  }
  side.arrived.assign(fleet_.model.layers, false);
  intake.id = transfer.id;
  intake.want.assign(fleet_.model.groups, transfer.want());
  intake.blocks = side.blocks;
  intake.lease_ms = transfer.lease_ms;
  intake.content = transfer.bound[1];
  for (std::uint32_t group = 0; group < fleet_.model.groups; ++group) {
    process.cache->open(transfer.want(), group, side.blocks);
  }
  std::shared_ptr<engine::Outcome> outcome;
  if (!process.receiver->receive(std::move(intake), &outcome).ok()) return never(side);
  begun(side, std::move(outcome), transfer.lease_ms * kMs);
}

}  // namespace hetkv::sim
