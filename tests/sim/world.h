// Simulated time: what happens, in the order of its time, out of one seed.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <queue>
#include <string>
#include <vector>

namespace hetkv::sim {

constexpr std::uint64_t kUs = 1'000;
constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kSecond = 1'000'000'000;

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next();
  std::uint64_t below(std::uint64_t bound) { return bound == 0 ? 0 : next() % bound; }
  // Inclusive.
  std::uint64_t between(std::uint64_t low, std::uint64_t high) { return low + below(high - low + 1); }
  bool chance(double probability) { return static_cast<double>(next() >> 11) * 0x1.0p-53 < probability; }
  // Mostly far below `most`, as delays are: uniform in the logarithm, from `most / 1000`.
  std::uint64_t delay(std::uint64_t most);

 private:
  std::uint64_t state_;
};

std::uint64_t mix(std::uint64_t value);

class World {
 public:
  using Action = std::function<void()>;

  explicit World(std::uint64_t seed) : random(seed) {}
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  Random random;

  std::uint64_t now() const { return now_; }
  std::uint64_t steps() const { return steps_; }
  void at(std::uint64_t time, Action action);
  void after(std::uint64_t delay, Action action) { at(now_ + delay, std::move(action)); }
  // Runs what comes next; false where nothing does.
  bool step();

  // A line of the trace: `format` has one {} for each of its numbers.
  void note(const char* format, std::uint64_t a = 0, std::uint64_t b = 0, std::uint64_t c = 0, std::uint64_t d = 0);
  // The latest lines.
  std::string trace() const;
  // Equal for two runs in which the same things happened.
  std::uint64_t digest() const { return digest_; }
  // Also prints each line as it comes.
  bool loud = false;

  // An invariant is broken. The first one counts.
  void violate(std::string what);
  const std::string& violation() const { return violation_; }
  bool ok() const { return violation_.empty(); }

 private:
  struct Event {
    std::uint64_t time;
    std::uint64_t order;
    Action action;
    bool operator<(const Event& other) const { return time != other.time ? time > other.time : order > other.order; }
  };
  struct Line {
    std::uint64_t time = 0;
    const char* format = nullptr;
    std::array<std::uint64_t, 4> numbers{};
    std::string text() const;
  };
  static constexpr std::size_t kLines = 256;

  std::uint64_t now_ = 0;
  std::uint64_t order_ = 0;
  std::uint64_t steps_ = 0;
  std::priority_queue<Event> events_;
  std::vector<Line> lines_ = std::vector<Line>(kLines);
  std::uint64_t next_line_ = 0;
  std::uint64_t digest_ = 0;
  std::string violation_;
};

}  // namespace hetkv::sim
