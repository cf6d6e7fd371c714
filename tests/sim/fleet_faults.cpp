// What happens to the processes of a fleet: they are killed, closed, stopped, and their clocks jump.
#include <algorithm>

#include "fleet.h"
#include "inspect.h"

namespace hetkv::sim {

void Fleet::disturb(Process& process, std::uint64_t duration) {
  process.disturbed_until = std::max(process.disturbed_until, world.now() + duration + 1);
}

bool Fleet::disturbed(const Process& process, std::uint64_t since) const {
  return !process.site.alive || process.site.paused ||
         (process.disturbed_until > 0 && process.disturbed_until + recovery_ >= since);
}

bool Fleet::disturbed(const Process& sender, const Process& receiver, std::uint64_t since) const {
  return std::any_of(controls_.begin(), controls_.end(), [&](const auto& at) {
    if (at->side[0] != &sender || at->side[1] != &receiver) return false;
    const bool over = at->closed[0] && at->closed[1];
    return (at->forged && !over) || (at->disturbed_until > 0 && at->disturbed_until + recovery_ >= since);
  });
}

void Fleet::kill(Process& process) {
  if (!process.site.alive) return;
  world.note("process {} is killed", process.site.id);
  bury(process);
  on_death(process, false);
  restart(process);
}

// Ends a process without a word: its engine sees a transport and a mover that end everything at once.
void Fleet::bury(Process& process) {
  process.site.alive = false;
  process.waiting.clear();
  process.transport->die();
  process.mover->die();
  process.mover->on_moved = [] {};
  process.sender.reset();
  process.receiver.reset();
  for (const auto& control : controls_) {
    for (int at = 0; at < 2; ++at) {
      if (control->side[at] == &process) close_side(*control, at);
    }
  }
}

void Fleet::close(Process& process) {
  if (!process.site.alive || process.site.paused) return;
  world.note("process {} closes", process.site.id);
  process.transport->go_on();
  process.due = ~std::uint64_t{0};
  for (const auto& control : controls_) {
    for (int at = 0; at < 2; ++at) {
      if (control->side[at] == &process) disturb(*control->side[1 - at]);
    }
  }
  process.site.wake = [] {};
  process.site.alive = false;  // nobody runs its engine but stop()
  process.engine()->stop();
  drain_events(process);
  process.waiting.clear();
  on_death(process, true);
  process.sender.reset();
  process.receiver.reset();
  for (const auto& control : controls_) {
    for (int at = 0; at < 2; ++at) {
      if (control->side[at] == &process) close_side(*control, at);
    }
  }
  restart(process);
}

// Its peers lose a process that is silent for longer than the timeout.
void Fleet::expect_lost(Process& process) {
  for (const auto& control : controls_) {
    for (int at = 0; at < 2; ++at) {
      const bool standing = control->side[at] == &process && control->usable(at) && control->usable(1 - at);
      if (!standing || control->side[1 - at]->site.paused || !control->side[1 - at]->site.alive) continue;
      world.after(
          3 * config.peer_timeout_ms * kMs / 2 + 200 * kMs,
          [this, &process, &peer = *control->side[1 - at], at = control.get(), which = 1 - at, since = world.now()] {
            if (process.site.paused && process.paused_at == since && peer.site.alive && !peer.site.paused &&
                !disturbed(peer, since) && at->usable(which)) {
              world.violate("a peer that is silent is not lost");
            }
          });
    }
  }
}

// Whoever writes into a slot holds it, or held it when its link was lost.
void Fleet::check_write(std::uint64_t writer, std::uint64_t address) {
  for (const auto& process : processes_) {
    if (process->sends || process->receiver == nullptr) continue;
    const auto holder = engine::Inspect::writer(*process->receiver, address);
    if (!holder) continue;
    bool forged = false;
    for (const auto& control : controls_) {
      if (control->side[1] != process.get() || control->side[0]->site.id != writer) continue;
      if (control->added[1] && control->id[1] == *holder) return;
      forged |= control->forged;
    }
    if (!forged) {
      world.violate("process " + std::to_string(writer) + " writes into a slot that it does not hold, of process " +
                    std::to_string(process->site.id));
    } else {
      spoil(*process, writer, engine::Inspect::user(*process->receiver, address));
    }
  }
}

// A sender whose peer was made to believe that it spent a slot goes on writing into it: what another link has there by
// then fails by its checksum, unless peers are isolated.
void Fleet::spoil(const Process& receiver, std::uint64_t writer, std::uint32_t user) {
  for (const auto& control : controls_) {
    const bool uses = control->side[1] == &receiver && control->added[1] && control->id[1] == user;
    if (!uses || control->side[0]->site.id == writer) continue;
    world.note("process {} writes into a slot of link {}", writer, control->number);
    if (profile_.isolate) world.violate("a peer reaches a slot of another link, though peers are isolated");
    disturb(*control);
  }
}

void Fleet::pause(Process& process, std::uint64_t duration) {
  if (!process.site.alive || process.site.paused) return;
  process.paused_at = world.now();
  expect_lost(process);
  world.note("process {} stops for {} us", process.site.id, duration / kUs);
  process.site.paused = true;
  disturb(process, duration);
  world.after(duration, [this, &process] {
    if (!process.site.alive) return;
    world.note("process {} goes on", process.site.id);
    process.site.paused = false;
    for (auto& action : std::exchange(process.waiting, {})) perform(process, std::move(action));
    if (process.site.alive) wake(process);
  });
}

void Fleet::jump(Process& process, std::uint64_t by) {
  if (!process.site.alive) return;
  world.note("the clock of process {} jumps {} ms forward", process.site.id, by / kMs);
  process.clock->ahead += by;
  disturb(process);
  wake(process);
}

}  // namespace hetkv::sim
