// Time as engines and movers see it, so that tests and simulations can give them another one.
#pragma once

#include <cstdint>
#include <memory>

namespace hetkv {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual std::uint64_t now_ns() const = 0;   // never goes back; of no fixed start
  virtual std::uint64_t wall_ns() const = 0;  // since 1970
};

// CLOCK_MONOTONIC and the wall clock of this host.
std::shared_ptr<const Clock> system_clock();

}  // namespace hetkv
