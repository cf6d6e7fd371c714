#include "profile.h"

namespace hetkv::sim {

Profile Profile::draw(Random& random) {
  Profile profile;
  profile.most_delay = random.chance(0.5) ? 200 * kUs : 4 * kMs;
  profile.most_move = random.chance(0.2) ? 0 : random.chance(0.5) ? 100 * kUs : 10 * kMs;
  profile.moves_while_paused = random.chance(0.5);
  if (random.chance(0.3)) profile.aborted = 0.1;
  if (random.chance(0.3)) profile.short_lease = 0.1;
  if (random.chance(0.3)) profile.unequal = 0.1;
  if (random.chance(0.5)) profile.again = 0.7;
  if (random.chance(0.2)) profile.stalled = 0.05;
  if (random.chance(0.3)) return profile;  // a seed in which nothing fails on its own
  const auto some = [&](std::uint32_t most) {
    return random.chance(0.4) ? static_cast<std::uint32_t>(random.between(1, most)) : 0;
  };
  const auto rarely = [&](double chance) { return random.chance(0.25) ? chance : 0; };
  profile.bad_message = rarely(0.002);
  profile.bad_put = rarely(0.01);
  profile.bad_move = rarely(0.01);
  profile.flipped = rarely(0.05);
  profile.no_memory = rarely(0.05);
  profile.slow_move = rarely(0.01);
  profile.forgeries = some(8);
  profile.cuts = some(4);
  profile.kills = some(4);
  profile.pauses = some(4);
  profile.jumps = some(2);
  profile.losses = some(4);
  profile.closes = some(2);
  return profile;
}

}  // namespace hetkv::sim
