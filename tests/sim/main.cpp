// The engines of csrc/engine in a simulated world: `hetkv_sim --first 1 --seeds 100`. Exit status 1: an invariant is
// broken; the seed and the end of its trace are printed, and `--first SEED --seeds 1 --trace` shows all of it.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "fleet.h"
#include "forge.h"
#include "inspect.h"
#include "transfers.h"

int hetkv_mutant = 0;  // the fault that is turned on, where faults were planted (mutants.py)

namespace hetkv::sim {
namespace {

struct Options {
  std::uint64_t first = 1;
  std::uint64_t seeds = 1;
  std::uint64_t transfers = 100;  // of a seed
  double seconds = 1e9;           // begins no seed after that
  bool trace = false;
  bool twice = false;     // each seed, to see that it replays
  bool progress = false;  // prints each seed before it begins, and dies of SIGALRM in one that does not end
};

struct Totals {
  Counts counts;
  std::uint64_t seeds = 0;
  std::uint64_t calm = 0;
  std::uint64_t steps = 0;
  std::uint64_t frames = 0;
  std::uint64_t kills = 0, closes = 0, pauses = 0, jumps = 0, cuts = 0, losses = 0, forgeries = 0;
};

constexpr std::uint64_t kQuiet = 50 * kMs;  // until the first links are there
constexpr std::uint64_t kMostSteps = 50'000'000;
// Times 100 ms from the last fault to the end of all requests: of one id they follow each other, a hold time each.
constexpr int kMostWaits = 3000;
constexpr unsigned kMostSeconds = 20;  // of a seed; it takes less than one

// What befalls the fleet, spread over the time in which requests begin.
void plan_faults(Fleet& fleet, const Profile& profile, std::uint64_t duration, Totals& totals) {
  World& world = fleet.world;
  const auto some = [&fleet, &world]() -> Process& {
    return *fleet.currents()[world.random.below(fleet.currents().size())];
  };
  const auto times = [&](std::uint32_t count, std::uint64_t& total, auto action) {
    for (std::uint32_t i = 0; i < count; ++i) {
      world.at(kQuiet + world.random.below(duration), action);
      ++total;
    }
  };
  times(profile.kills, totals.kills, [&fleet, some] { fleet.kill(some()); });
  times(profile.closes, totals.closes, [&fleet, some] { fleet.close(some()); });
  times(profile.pauses, totals.pauses,
        [&fleet, &world, some] { fleet.pause(some(), world.random.delay(4 * kSecond)); });
  times(profile.jumps, totals.jumps, [&fleet, &world, some] { fleet.jump(some(), world.random.delay(12 * kSecond)); });
  times(profile.cuts, totals.cuts, [&fleet, &world, some] {
    Process& a = some();
    Process& b = some();
    const std::uint64_t duration = world.random.delay(2 * kSecond);
    if (&a == &b || a.sends == b.sends) return;
    world.note("network: cut between {} and {} for {} us", a.site.id, b.site.id, duration / kUs);
    fleet.disturb(a, duration);
    fleet.disturb(b, duration);
    fleet.network.cut(a.site.id, b.site.id, world.now() + duration);
  });
  times(profile.losses, totals.losses, [&fleet, &world, some] {
    Process& process = some();
    if (!process.site.alive) return;
    const auto& endpoints = process.transport->endpoints();
    if (endpoints.empty()) return;
    auto at = std::next(endpoints.begin(), static_cast<std::ptrdiff_t>(world.random.below(endpoints.size())));
    fleet.disturb(process);
    fleet.network.on_damage(process.site.id, at->second->peer());
    at->second->fail(Status::error(Code::kPeerLost, "simulated: the transport lost the link"));
  });
}

// A bit of a payload, while it is in a slot.
void flip(Fleet& fleet, const Profile& profile) {
  World& world = fleet.world;
  if (!fleet.network.faults || profile.flipped == 0 || !world.random.chance(profile.flipped)) return;
  Process& process = *fleet.currents()[world.random.below(fleet.currents().size())];
  if (!process.site.alive || process.sends) return;
  for (const auto& control : fleet.controls()) {
    if (control->side[1] != &process || !control->active[1]) continue;
    fleet.network.on_damage(process.site.id, control->side[0]->site.id);
  }
  engine::Inspect::flip(*process.receiver, world.random.next());
}

// Both sides are up, keep the rules, and nothing is on its way between them.
bool quiet(const Control& control) {
  const Process& sender = *control.side[0];
  const Process& receiver = *control.side[1];
  if (!sender.site.alive || !receiver.site.alive || !control.usable(0) || !control.usable(1)) return false;
  if (control.forged) return false;
  const SimEndpoint* ends[2] = {sender.transport->endpoint(control.number),
                                receiver.transport->endpoint(control.number)};
  return ends[0] != nullptr && ends[1] != nullptr && ends[0]->quiet() && ends[1]->quiet() &&
         sender.transport->quiet() && receiver.transport->quiet() && engine::Inspect::settled(*sender.sender) &&
         engine::Inspect::settled(*receiver.receiver) && engine::Inspect::up(*sender.sender, control.id[0]) &&
         engine::Inspect::up(*receiver.receiver, control.id[1]);
}

// Slots of a link are the same on both sides when nothing is on its way, and none that another link lacks is idle.
void compare_credits(Fleet& fleet) {
  for (const auto& control : fleet.controls()) {
    if (!quiet(*control)) continue;
    const engine::Sender& sender = *control->side[0]->sender;
    const engine::Receiver& receiver = *control->side[1]->receiver;
    const std::string link = "link " + std::to_string(control->number);
    if (engine::Inspect::held(sender, control->id[0]) != engine::Inspect::granted(receiver, control->id[1])) {
      fleet.world.violate(link + ": the two sides disagree on who has which slot");
    }
    if (engine::Inspect::idle(sender, control->id[0]) && engine::Inspect::over_share(receiver, control->id[1])) {
      fleet.world.violate(link + ": it keeps an idle slot, and another link has none");
    }
  }
}

void check_rest(Fleet& fleet) {
  for (const Process* process : fleet.currents()) {
    const std::string wrong =
        process->sends ? engine::Inspect::at_rest(*process->sender) : engine::Inspect::at_rest(*process->receiver);
    if (!wrong.empty()) fleet.world.violate("process " + std::to_string(process->site.id) + ": " + wrong);
    if (!process->mover->idle()) fleet.world.violate("a mover at rest has tasks");
    if (process->cache->taken() != 0) fleet.world.violate("blocks are still taken at rest");
  }
}

bool run_until(World& world, std::uint64_t time) {
  world.at(time, [] {});
  while (world.ok() && world.now() < time && world.step()) {
    if (world.steps() > kMostSteps) world.violate("the seed does not end");
  }
  return world.ok();
}

// One seed; the digest of what happened.
std::uint64_t run(std::uint64_t seed, const Options& options, Totals& totals, std::string* broken) {
  World world(mix(seed));
  world.loud = options.trace;
  Profile profile = Profile::draw(world.random);
  profile.verify_pool = seed % 3 == 0;
  profile.isolate = seed % 5 == 0;
  if (profile.verify_pool && !profile.calm() && seed % 2 == 0) profile.rewritten = 0.005;
  auto fleet = std::make_unique<Fleet>(world, profile);
  Transfers transfers(*fleet, profile);
  fleet->start_all();
  const std::uint64_t duration = options.transfers * world.random.between(500 * kUs, 10 * kMs);
  for (std::uint64_t i = 0; i < options.transfers; ++i) {
    world.at(kQuiet + world.random.below(duration), [&] { transfers.begin(); });
  }
  plan_faults(*fleet, profile, duration, totals);
  for (std::uint32_t i = 0; i < profile.forgeries; ++i) {
    world.at(kQuiet + world.random.below(duration), [&] { totals.forgeries += forge(*fleet, transfers) ? 1 : 0; });
  }
  bool going = true;
  std::function<void()> watch = [&] {
    if (!going) return;
    if (profile.bad_message == 0) compare_credits(*fleet);  // a lost message is seen when the next one comes
    flip(*fleet, profile);
    world.after(world.random.between(kMs, 5 * kMs), watch);
  };
  watch();
  run_until(world, kQuiet + duration);
  // No more faults: what is cut heals, and everything comes to rest.
  fleet->network.faults = going = false;
  fleet->network.heal();
  for (int i = 0; world.ok() && !transfers.over(); ++i) {
    if (i == kMostWaits) world.violate("requests do not end:" + transfers.open());
    run_until(world, world.now() + 100 * kMs);
  }
  // A ticket that asks for nothing may wait for a request that never comes, until its lease is over.
  run_until(world, world.now() + 2 * fleet->recovery() + 16 * kSecond);
  if (world.ok()) compare_credits(*fleet);
  if (world.ok()) check_rest(*fleet);
  for (const Process* process : fleet->currents()) {
    if (process->site.alive) totals.frames += process->engine()->stats().frames;
  }
  if (world.ok()) fleet.reset();
  if (!world.ok()) {
    *broken = world.violation();
    std::printf("seed %llu: %s\n%s", static_cast<unsigned long long>(seed), broken->c_str(), world.trace().c_str());
    static_cast<void>(fleet.release());  // what is in it may be anything
  }
  ++totals.seeds;
  if (profile.calm()) ++totals.calm;
  totals.steps += world.steps();
  const Counts& counts = transfers.counts();
  totals.counts.transfers += counts.transfers;
  totals.counts.complete += counts.complete;
  totals.counts.failed += counts.failed;
  totals.counts.unbegun += counts.unbegun;
  totals.counts.layers += counts.layers;
  totals.counts.again += counts.again;
  return world.digest();
}

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const auto number = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 10) : 0; };
    if (std::strcmp(argv[i], "--first") == 0) {
      options.first = number();
    } else if (std::strcmp(argv[i], "--seeds") == 0) {
      options.seeds = number();
    } else if (std::strcmp(argv[i], "--transfers") == 0) {
      options.transfers = number();
    } else if (std::strcmp(argv[i], "--seconds") == 0) {
      options.seconds = static_cast<double>(number());
    } else if (std::strcmp(argv[i], "--mutant") == 0) {
      hetkv_mutant = static_cast<int>(number());
    } else if (std::strcmp(argv[i], "--trace") == 0) {
      options.trace = true;
    } else if (std::strcmp(argv[i], "--progress") == 0) {
      options.progress = true;
    } else if (std::strcmp(argv[i], "--twice") == 0) {
      options.twice = true;
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      return 2;
    }
  }
  Totals totals;
  std::string broken;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (std::uint64_t seed = options.first; seed < options.first + options.seeds && broken.empty(); ++seed) {
    if (elapsed() > options.seconds) break;
    if (options.progress) std::printf("begins seed %llu\n", static_cast<unsigned long long>(seed));
    if (options.progress) static_cast<void>(std::fflush(stdout)), alarm(kMostSeconds);
    const std::uint64_t digest = run(seed, options, totals, &broken);
    if (!options.twice || !broken.empty()) continue;
    Totals again;
    if (run(seed, options, again, &broken) != digest) {
      broken = "the seed does not replay";
      std::printf("seed %llu: %s\n", static_cast<unsigned long long>(seed), broken.c_str());
    }
  }
  const auto number = [](std::uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf(
      "{\"first\": %llu, \"seeds\": %llu, \"calm\": %llu, \"transfers\": %llu, \"complete\": %llu, \"failed\": %llu, "
      "\"unbegun\": %llu, \"layers\": %llu, \"frames\": %llu, \"steps\": %llu, \"kills\": %llu, \"closes\": %llu, "
      "\"pauses\": %llu, \"jumps\": %llu, \"cuts\": %llu, \"losses\": %llu, "
      "\"forgeries\": %llu, \"again\": %llu, \"seconds\": %.2f, \"broken\": %s}\n",
      number(options.first), number(totals.seeds), number(totals.calm), number(totals.counts.transfers),
      number(totals.counts.complete), number(totals.counts.failed), number(totals.counts.unbegun),
      number(totals.counts.layers), number(totals.frames), number(totals.steps), number(totals.kills),
      number(totals.closes), number(totals.pauses), number(totals.jumps), number(totals.cuts), number(totals.losses),
      number(totals.forgeries), number(totals.counts.again), elapsed(), broken.empty() ? "false" : "true");
  return broken.empty() ? 0 : 1;
}

}  // namespace
}  // namespace hetkv::sim

int main(int argc, char** argv) {
  return hetkv::sim::main(argc, argv);
}
