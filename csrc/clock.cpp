#include "clock.h"

#include <chrono>

namespace hetkv {
namespace {

template <typename Source>
std::uint64_t ns() {
  const auto since = Source::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
}

class SystemClock final : public Clock {
 public:
  std::uint64_t now_ns() const override { return ns<std::chrono::steady_clock>(); }
  std::uint64_t wall_ns() const override { return ns<std::chrono::system_clock>(); }
};

}  // namespace

std::shared_ptr<const Clock> system_clock() {
  static const auto clock = std::make_shared<const SystemClock>();
  return clock;
}

}  // namespace hetkv
