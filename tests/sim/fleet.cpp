#include "fleet.h"

#include <algorithm>
#include <cstring>

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostControl = 3 * kMs;  // delay of a control message
constexpr std::uint64_t kYear2026 = 1'767'225'600ull * kSecond;

wire::SipKey key_of(std::uint64_t secret, std::uint64_t link, int from) {
  wire::SipKey key{};
  const std::uint64_t words[2] = {mix(secret ^ (link * 2 + static_cast<std::uint64_t>(from))), mix(secret + link)};
  std::memcpy(key.data(), words, sizeof words);
  return key;
}

}  // namespace

Fleet::Fleet(World& its_world, const Profile& profile)
    : world(its_world), network(its_world, profile), model(Model::draw(its_world.random)), profile_(profile) {
  Random& random = world.random;
  send_instances_ = static_cast<std::uint32_t>(random.between(1, 3));
  receive_instances_ = static_cast<std::uint32_t>(random.between(1, 3));
  send_ranks_ = static_cast<std::uint32_t>(random.between(1, 2));
  receive_ranks_ = static_cast<std::uint32_t>(random.between(1, 2));
  secret_ = random.next();
  config.slot_bytes = std::size_t{64} << random.below(5);
  config.window_bytes = config.slot_bytes * random.between(1, 6);
  config.staging_slots = static_cast<int>(random.between(1, 3));
  config.max_slots_per_link = static_cast<int>(random.between(1, 4));
  config.bundle_frames = static_cast<int>(random.between(1, 8));
  config.heartbeat_ms = static_cast<std::uint32_t>(random.between(50, 150));
  config.peer_timeout_ms = static_cast<std::uint32_t>(random.between(4, 8) * config.heartbeat_ms);
  config.direct = random.chance(0.8);
  config.isolate_peers = profile.isolate;
  if (profile.verify_pool) config.verify_bytes = config.slot_bytes;  // nothing is converted
  for (std::uint32_t layer = 0; layer < model.layers; ++layer) {
    config.layer_groups.push_back(static_cast<std::int32_t>(model.group_of(layer)));
  }
  recovery_ = 2 * config.peer_timeout_ms * kMs + 500 * kMs;
  network.on_write = [this](std::uint64_t writer, std::uint64_t address) { check_write(writer, address); };
  network.on_damage = [this](std::uint64_t a, std::uint64_t b) {
    for (const auto& process : processes_) {
      if (process->site.id == a || process->site.id == b) disturb(*process);
    }
  };
}

Fleet::~Fleet() {
  for (const auto& process : processes_) {
    if (process->site.alive) bury(*process);
  }
}

Process& Fleet::current(bool sends, std::uint32_t instance, std::uint32_t rank) const {
  return **std::find_if(current_.begin(), current_.end(), [&](const Process* at) {
    return at->sends == sends && at->instance == instance && at->rank == rank;
  });
}

bool Fleet::share_heads(const Process& a, const Process& b) {
  return std::max(a.cache->first_head(), b.cache->first_head()) < std::min(a.cache->last_head(), b.cache->last_head());
}

const Control* Fleet::link(const Process& sender, const Process& receiver, int at) const {
  for (const auto& control : controls_) {
    if (control->side[0] == &sender && control->side[1] == &receiver && control->usable(at)) return control.get();
  }
  return nullptr;
}

void Fleet::start_all() {
  for (const bool sends : {true, false}) {
    for (std::uint32_t instance = 0; instance < instances(sends); ++instance) {
      for (std::uint32_t rank = 0; rank < ranks(sends); ++rank) {
        current_.push_back(&start(sends, instance, rank));
      }
    }
  }
  for (Process* process : current_) {
    if (process->sends) connect_all(*process);
  }
}

Process& Fleet::start(bool sends, std::uint32_t instance, std::uint32_t rank) {
  auto made = std::make_unique<Process>();
  Process& process = *made;
  process.site.id = next_process_++;
  process.sends = sends;
  process.instance = instance;
  process.rank = rank;
  // A host's wall clock may be earlier than it was before.
  process.clock = std::make_shared<SimClock>(world, kYear2026 + world.random.below(100 * kMs));
  const std::uint32_t heads = model.heads / ranks(sends);
  process.cache = std::make_unique<Cache>(world, model, rank * heads, (rank + 1) * heads);
  process.site.space.map(process.cache->address(), process.cache->size());
  process.site.wake = [this, &process] { wake(process); };
  engine::Parts parts;
  auto transport = std::make_unique<SimTransport>(network, process.site);
  auto mover = std::make_unique<SimMover>(network, process.site, process.clock);
  process.transport = transport.get();
  process.mover = mover.get();
  process.mover->on_moved = [this, &process] { on_moved(process); };
  parts.transport = std::move(transport);
  parts.mover = std::move(mover);
  parts.clock = process.clock;
  if (sends) {
    process.sender = std::make_unique<engine::Sender>(config, std::move(parts));
  } else {
    process.receiver = std::make_unique<engine::Receiver>(config, std::move(parts));
  }
  if (!process.engine()->start(false).ok()) world.violate("an engine did not start");
  world.note("process {} starts: role {}, instance {}, rank {}", process.site.id, sends ? 0 : 1, instance, rank);
  processes_.push_back(std::move(made));
  wake(process);
  return process;
}

void Fleet::restart(const Process& dead) {
  world.after(world.random.between(kMs, 300 * kMs), [this, &dead] {
    Process& process = start(dead.sends, dead.instance, dead.rank);
    *std::find(current_.begin(), current_.end(), &dead) = &process;
    disturb(process);
    connect_all(process);
  });
}

// --- turns

void Fleet::perform(Process& process, std::function<void()> action) {
  if (!process.site.alive) return;
  if (process.site.paused) {
    process.waiting.push_back(std::move(action));
    return;
  }
  action();
  if (process.site.alive) wake(process);
}

void Fleet::wake(Process& process) {
  schedule(process, world.now() + world.random.below(20 * kUs) + 1);
}

void Fleet::schedule(Process& process, std::uint64_t time) {
  if (time >= process.due || !process.site.alive) return;
  process.due = time;
  world.at(time, [this, &process, time] {
    if (process.due != time) return;
    process.due = ~std::uint64_t{0};
    turn(process);
  });
}

void Fleet::turn(Process& process) {
  if (!process.site.alive || process.site.paused) return;
  engine::Engine& engine = *process.engine();
  const bool moved = engine.turn();
  drain_events(process);
  if (!process.site.alive) return;
  on_turn(process);
  const std::uint64_t now = process.clock->now_ns();
  const std::uint64_t due = engine.next_ns(now);
  schedule(process,
           moved ? world.now() + world.random.below(20 * kUs) + 1 : world.now() + (due > now ? due - now : 0) + 1);
}

void Fleet::drain_events(Process& process) {
  for (const engine::Event& event : process.engine()->events().take()) {
    if (event.kind == engine::EventKind::kLinkLost || event.kind == engine::EventKind::kLinkDrained) {
      on_link_event(process, event);
    } else {
      on_event(process, event);
    }
  }
}

// --- control connections

void Fleet::connect_all(Process& process) {
  for (Process* other : current_) {
    if (other->sends == process.sends || !other->site.alive || !share_heads(process, *other)) continue;
    connect(process.sends ? process : *other, process.sends ? *other : process);
  }
}

void Fleet::connect(Process& sender, Process& receiver) {
  for (const auto& control : controls_) {
    const bool same = control->side[0] == &sender && control->side[1] == &receiver;
    if (same && !(control->closed[0] && control->closed[1])) return;
  }
  Control& control = *controls_.emplace_back(std::make_unique<Control>());
  control.side[0] = &sender;
  control.side[1] = &receiver;
  control.number = next_link_++;
  for (int at = 0; at < 2; ++at) {
    world.after(world.random.delay(kMostControl),
                [this, &control, at] { perform(*control.side[at], [this, &control, at] { add_link(control, at); }); });
  }
}

engine::LinkConfig Fleet::link_config(const Control& control, int at) const {
  const Process& mine = *control.side[at];
  const Process& theirs = *control.side[1 - at];
  engine::LinkConfig link;
  link.address.resize(sizeof theirs.site.id);
  std::memcpy(link.address.data(), &theirs.site.id, sizeof theirs.site.id);
  link.number = control.number;
  link.minor = wire::kMinor;
  link.send_key = key_of(secret_, control.number, at);
  link.receive_key = key_of(secret_, control.number, 1 - at);
  link.instance = (at == 0 ? "d" : "p") + std::to_string(theirs.instance);
  link.name = link.instance + "/" + std::to_string(theirs.rank);
  link.instance_links = 0;
  for (const Process* other : current_) {
    const bool same = other->sends == theirs.sends && other->instance == theirs.instance;
    if (same && share_heads(mine, *other)) ++link.instance_links;
  }
  const std::uint32_t first = std::max(mine.cache->first_head(), theirs.cache->first_head());
  const std::uint32_t last = std::min(mine.cache->last_head(), theirs.cache->last_head());
  for (std::uint32_t layer = 0; layer < model.layers; ++layer) {
    link.plans.push_back(mine.cache->plan(layer, first, last));
  }
  return link;
}

void Fleet::add_link(Control& control, int at) {
  if (control.closed[at]) return;
  Process& process = *control.side[at];
  if (const auto status = process.engine()->add_link(link_config(control, at), &control.id[at]); !status.ok()) {
    world.violate("a link cannot be added: " + status.detail);
    return;
  }
  control.added[at] = true;
  activate(control, at);
  world.after(world.random.delay(kMostControl), [this, &control, at] {
    perform(*control.side[1 - at], [this, &control, at] {
      control.ready[1 - at] = true;
      activate(control, 1 - at);
    });
  });
}

void Fleet::activate(Control& control, int at) {
  if (!control.added[at] || !control.ready[at] || control.closed[at]) return;
  world.note("link {}: active at process {}", control.number, control.side[at]->site.id);
  control.active[at] = true;
  control.side[at]->engine()->activate_link(control.id[at]);
}

void Fleet::close_side(Control& control, int at) {
  if (control.closed[at]) return;
  control.closed[at] = true;
  if (control.closed[1 - at]) return connect_again(control);
  world.after(world.random.delay(kMostControl), [this, &control, at] {
    perform(*control.side[1 - at], [this, &control, at] { connection_lost(control, 1 - at); });
  });
}

void Fleet::connection_lost(Control& control, int at) {
  if (control.closed[at]) return;
  control.closed[at] = true;
  Process& process = *control.side[at];
  world.note("link {}: connection lost at process {}", control.number, process.site.id);
  if (control.added[at]) {
    process.engine()->drop_link(control.id[at], Status::error(Code::kPeerLost, "the connection ended"));
    if (!process.sends) process.receiver->retire_link(control.id[at]);
  }
  connect_again(control);
}

void Fleet::connect_again(const Control& control) {
  world.after(world.random.between(kMs, 100 * kMs), [this, &control] {
    if (control.side[0]->site.alive && control.side[1]->site.alive) connect(*control.side[0], *control.side[1]);
  });
}

void Fleet::on_link_event(Process& process, const engine::Event& event) {
  const int at = process.sends ? 0 : 1;
  for (const auto& control : controls_) {
    if (control->side[at] != &process || control->id[at] != event.link || !control->added[at]) continue;
    world.note("link {}: event {} at process {}", control->number, static_cast<std::uint64_t>(event.kind),
               process.site.id);
    if (event.kind == engine::EventKind::kLinkLost) {
      control->lost[at] = true;
      const std::uint64_t since = world.now() > recovery_ ? world.now() - recovery_ : 0;
      if (!control->closed[1 - at] && !disturbed(process, since) && !disturbed(*control->side[1 - at], since) &&
          !disturbed(*control->side[0], *control->side[1], since)) {
        world.violate("a link was lost for no reason: " + event.status.detail);
      }
      disturb(*control);
    } else if (process.sends) {
      close_side(*control, at);
    }
    return;
  }
  world.violate("an event of a link that nobody added");
}

}  // namespace hetkv::sim
