// What a seed's world is like, and what may go wrong in it. Each seed has some kinds of faults and not others, so that
// what one hides another shows.
#pragma once

#include <cstdint>

#include "world.h"

namespace hetkv::sim {

enum class Reach : std::uint8_t { kStore, kRma, kMessage };  // how payloads get into a peer's slots

struct Profile {
  // The ordinary.
  std::uint64_t most_delay = 0;     // ns: of a message or a part of a put
  std::uint64_t most_move = 0;      // ns: of a pack or unpack; 0: done when submit() returns
  bool moves_while_paused = false;  // a device goes on while its process is stopped
  // Chances, of each time.
  double bad_message = 0;    // dropped, doubled, swapped with the next one, or with a bit flipped
  double bad_put = 0;        // ends with an error, written in part
  double bad_move = 0;       // the device reports an error, with the task done in part
  double flipped = 0;        // a bit of a payload, while it is in a slot
  double rewritten = 0;      // a bit of the pool, after an unpack into it; only where the pool is read again
  double slow_move = 0;      // a part of a pack waits for long on its device
  double no_memory = 0;      // an allocation or registration fails
  bool verify_pool = false;  // receivers read again what they unpacked
  bool isolate = false;      // no two links have the same slot's memory
  // How often in a seed.
  std::uint32_t cuts = 0;    // of the network between two processes, for a while
  std::uint32_t kills = 0;   // of a process, which starts again under its name
  std::uint32_t pauses = 0;  // of a process: SIGSTOP, later SIGCONT
  std::uint32_t jumps = 0;   // of a process's clock, forward
  std::uint32_t losses = 0;  // of a link, by one side's transport
  std::uint32_t closes = 0;  // of a process, in order, which starts again
  // Share of requests.
  double aborted = 0;  // by one side or both
  double short_lease = 0;
  double unequal = 0;           // the two sides mean other contents or token counts
  double stalled = 0;           // the prefill stops in the middle, until the request is given up
  double again = 0;             // of those that failed at their receiver: it asks again at once, under the same id
  std::uint32_t forgeries = 0;  // messages of a peer that has the keys but does not keep the rules

  bool calm() const {
    return bad_message == 0 && bad_put == 0 && bad_move == 0 && rewritten == 0 && slow_move == 0 && flipped == 0 &&
           no_memory == 0 && cuts == 0 && kills == 0 && pauses == 0 && jumps == 0 && losses == 0 && closes == 0 &&
           forgeries == 0;
  }

  static Profile draw(Random& random);
};

}  // namespace hetkv::sim
