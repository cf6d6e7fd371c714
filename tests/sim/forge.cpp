#include "forge.h"

#include <algorithm>

#include "inspect.h"

namespace hetkv::sim {
namespace {

using engine::Inspect;

struct Target {
  const Side* side = nullptr;  // a receiver's part of a transfer that is under way
  bool own = false;            // it asked this peer for it
};

// A request of the receiver's, of this link's sender or of another one.
Target some_request(Fleet& fleet, const Transfers& transfers, const Control& control, bool own) {
  std::vector<Target> found;
  for (const auto& transfer : transfers.all()) {
    for (const auto& side : transfer->sides[1]) {
      if (side->process != control.side[1] || side->outcome == nullptr || side->ended) continue;
      const bool mine = transfer->instance[0] == control.side[0]->instance;
      if (mine == own) found.push_back({side.get(), mine});
    }
  }
  return found.empty() ? Target{} : found[fleet.world.random.below(found.size())];
}

void inject(Control& control, int from, const std::vector<std::uint8_t>& message) {
  control.side[from]->engine()->inject(control.id[from], message);
}

template <typename Body>
void send(Fleet& fleet, Control& control, int from, wire::Prelude prelude, const Body& body) {
  std::vector<std::uint8_t> message;
  prelude.sequence = control.side[from]->engine()->next_sequence(control.id[from]);
  wire::encode(prelude, body, fleet.link_config(control, from).send_key, message);
  inject(control, from, message);
}

// A frame that is right, before it is made wrong.
wire::Frame frame_of(const Fleet& fleet, const Control& control, const Transfer& transfer) {
  const engine::LinkConfig link = fleet.link_config(control, 0);
  const engine::LayerPlan& plan = link.plans[fleet.world.random.below(link.plans.size())];
  wire::Frame frame;
  frame.group = plan.group;
  frame.layer = plan.layer;
  frame.head_start = plan.head_start;
  frame.head_stop = plan.head_stop;
  frame.token_start = transfer.want().start;
  frame.token_stop = transfer.want().stop;
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    frame.segments = static_cast<std::uint16_t>(frame.segments | (1u << i));
    frame.dtypes[i] = static_cast<std::uint8_t>(plan.segments[i].wire_dtype);
    frame.channels[i] = static_cast<std::uint32_t>(plan.segments[i].channels);
  }
  return frame;
}

bool forge_frame(Fleet& fleet, const Transfers& transfers, Control& control) {
  Random& random = fleet.world.random;
  const std::uint64_t kind = random.below(7);
  const Target target = some_request(fleet, transfers, control, kind != 3);
  if (target.side == nullptr) return false;
  const Transfer& transfer = *target.side->transfer;
  engine::Receiver& receiver = *control.side[1]->receiver;
  const auto own = Inspect::granted(receiver, control.id[1]);
  wire::Frame frame = frame_of(fleet, control, transfer);
  if (frame.token_start >= frame.token_stop) return false;
  wire::Prelude prelude;
  prelude.type = wire::Type::kFrame;
  prelude.request = transfer.id;
  prelude.epoch = receiver.epoch(target.side->outcome->handle);
  if (!own.empty()) std::tie(frame.slot, frame.generation) = *own.begin();
  switch (kind) {
    case 0:  // tokens that the receiver has already
      if (own.empty() || transfer.kept == 0) return false;
      frame.token_start = 0;
      break;
    case 1:  // tokens past those that it asked for
      if (own.empty()) return false;
      frame.token_stop += random.between(1, 3);
      break;
    case 2: {  // a slot that another peer holds
      std::vector<std::pair<std::uint32_t, std::uint32_t>> others;
      for (const auto& other : fleet.controls()) {
        if (other->side[1] != control.side[1] || other.get() == &control || !other->active[1]) continue;
        for (const auto& slot : Inspect::granted(receiver, other->id[1])) others.push_back(slot);
      }
      if (others.empty()) return false;
      std::tie(frame.slot, frame.generation) = others[random.below(others.size())];
      break;
    }
    case 3:  // a request that another peer was asked for
      break;
    case 4:  // another attempt
      prelude.epoch -= 1;
      break;
    case 5:  // memory that is not there any more, or not yet
      if (own.empty()) return false;
      frame.generation += 1;
      break;
    default: {  // a part of what came before
      if (own.empty() || frame.token_stop - frame.token_start < 2) return false;
      frame.token_stop -= 1;
    }
  }
  const engine::LinkConfig link = fleet.link_config(control, 0);
  const auto plan = std::find_if(link.plans.begin(), link.plans.end(),
                                 [&](const engine::LayerPlan& at) { return at.layer == frame.layer; });
  frame.payload_length = plan->payload_bytes(frame.token_stop - frame.token_start);
  if (frame.payload_length > fleet.config.slot_bytes) return false;
  frame.checksum = random.next();
  fleet.world.note("forged: a frame of kind {} over link {}, for transfer {}", kind, control.number, transfer.number);
  // A slot of its own is spent by it, which the real sender does not know.
  control.forged |= kind != 5;
  fleet.disturb(control);
  send(fleet, control, 0, prelude, frame);
  return true;
}

bool forge_answer(Fleet& fleet, const Transfers& transfers, Control& control) {
  Random& random = fleet.world.random;
  const bool own = random.chance(0.5);
  std::vector<const Side*> sides;
  for (const auto& transfer : transfers.all()) {
    for (const auto& side : transfer->sides[0]) {
      const bool mine = transfer->instance[1] == control.side[1]->instance;
      if (side->process == control.side[0] && side->outcome != nullptr && !side->ended && mine == own) {
        sides.push_back(side.get());
      }
    }
  }
  if (sides.empty()) return false;
  const Side& side = *sides[random.below(sides.size())];
  wire::Prelude prelude;
  prelude.request = side.transfer->id;
  prelude.epoch = random.next();
  fleet.world.note("forged: an answer over link {}, for transfer {}", control.number, side.transfer->number);
  fleet.disturb(control);
  if (random.chance(0.5)) {
    prelude.type = wire::Type::kDone;
    send(fleet, control, 1, prelude, wire::Done{0, 0});
  } else {
    prelude.type = wire::Type::kAbort;
    send(fleet, control, 1, prelude, wire::Abort{Code::kAborted, "forged"});
  }
  return true;
}

// A sender gives up a request that another one was asked for, or another attempt of its own: nothing may come of it,
// not even for its own link.
bool forge_end(Fleet& fleet, const Transfers& transfers, Control& control) {
  const bool own = fleet.world.random.chance(0.5);
  const Target target = some_request(fleet, transfers, control, own);
  if (target.side == nullptr) return false;
  wire::Prelude prelude;
  prelude.type = wire::Type::kAbort;
  prelude.request = target.side->transfer->id;
  prelude.epoch = control.side[1]->receiver->epoch(target.side->outcome->handle) - (own ? 1 : 0);
  fleet.world.note("forged: an end over link {}, of transfer {}", control.number, target.side->transfer->number);
  send(fleet, control, 0, prelude, wire::Abort{Code::kAborted, "forged"});
  return true;
}

}  // namespace

bool forge(Fleet& fleet, const Transfers& transfers) {
  for (int attempt = 0; attempt < 20; ++attempt) {
    const auto& controls = fleet.controls();
    Control& control = *controls[fleet.world.random.below(controls.size())];
    const Process& sender = *control.side[0];
    const Process& receiver = *control.side[1];
    const bool usable = control.usable(0) && control.usable(1) && sender.site.alive && receiver.site.alive &&
                        !sender.site.paused && !receiver.site.paused && Inspect::settled(*sender.engine()) &&
                        Inspect::settled(*receiver.engine());
    if (!usable) continue;
    const std::uint64_t kind = fleet.world.random.below(10);
    const auto made = kind < 7 ? forge_frame : kind < 9 ? forge_answer : forge_end;
    if (made(fleet, transfers, control)) return true;
  }
  return false;
}

}  // namespace hetkv::sim
