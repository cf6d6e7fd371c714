// Token ranges: their text, and sorted disjoint lists of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <vector>

#include "wire/message.h"

namespace hetkv::engine {

inline std::string range_text(std::uint64_t start, std::uint64_t stop) {
  return "[" + std::to_string(start) + ", " + std::to_string(stop) + ")";
}

// Adds a range to a sorted disjoint list, joined with the one before it where they touch; false, and nothing done,
// where it overlaps one of them.
inline bool add_range(std::vector<wire::TokenRange>& seen, wire::TokenRange added) {
  const auto at =
      std::lower_bound(seen.begin(), seen.end(), added, [](const auto& a, const auto& b) { return a.start < b.start; });
  if (at != seen.end() && at->start < added.stop) return false;
  if (at != seen.begin() && std::prev(at)->stop > added.start) return false;
  if (at != seen.begin() && std::prev(at)->stop == added.start) {
    std::prev(at)->stop = added.stop;
  } else {
    seen.insert(at, added);
  }
  return true;
}

}  // namespace hetkv::engine
