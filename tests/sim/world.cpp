#include "world.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace hetkv::sim {

std::uint64_t mix(std::uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
  return value ^ (value >> 31);
}

std::uint64_t Random::next() {
  state_ += 0x9E3779B97F4A7C15ull;
  return mix(state_);
}

std::uint64_t Random::delay(std::uint64_t most) {
  const std::uint64_t scale = std::uint64_t{1} << below(11);  // 1 to 1024
  return below(std::max<std::uint64_t>(most / scale, 1)) + 1;
}

void World::at(std::uint64_t time, Action action) {
  events_.push({std::max(time, now_), order_++, std::move(action)});
}

bool World::step() {
  if (events_.empty()) return false;
  Action action = std::move(const_cast<Event&>(events_.top()).action);  // its order does not depend on it
  now_ = events_.top().time;
  events_.pop();
  ++steps_;
  action();
  return true;
}

void World::note(const char* format, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
  Line& line = lines_[next_line_++ % kLines];
  line = {now_, format, {a, b, c, d}};
  for (const std::uint64_t number : {now_, a, b, c, d}) digest_ = mix(digest_ ^ number);
  if (loud) std::printf("%s\n", line.text().c_str());
}

std::string World::Line::text() const {
  char time_text[32];
  std::snprintf(time_text, sizeof time_text, "%12.6f ms  ", static_cast<double>(time) / kMs);
  std::string out = time_text;
  std::size_t used = 0;
  for (const char* at = format; *at != '\0'; ++at) {
    if (at[0] == '{' && at[1] == '}') {
      out += std::to_string(numbers[used++]);
      ++at;
    } else {
      out += *at;
    }
  }
  return out;
}

std::string World::trace() const {
  std::string out;
  for (std::uint64_t i = next_line_ > kLines ? next_line_ - kLines : 0; i < next_line_; ++i) {
    out += lines_[i % kLines].text() + "\n";
  }
  return out;
}

void World::violate(std::string what) {
  if (violation_.empty()) violation_ = std::move(what);
}

}  // namespace hetkv::sim
