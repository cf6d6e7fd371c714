// Token ranges: their text, and sets of them.
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

// Tokens that have been seen, in sorted disjoint ranges. One range, which is what most sets are, takes no memory of its
// own.
class RangeSet {
 public:
  // False, and nothing done, where `added` overlaps what is in the set.
  bool add(wire::TokenRange added) {
    if (first_.start == first_.stop) {
      first_ = added;
      return true;
    }
    if (more_.empty()) {
      if (added.start == first_.stop) {
        first_.stop = added.stop;
        return true;
      }
      more_.push_back(first_);
    }
    const auto at = std::lower_bound(more_.begin(), more_.end(), added,
                                     [](const auto& a, const auto& b) { return a.start < b.start; });
    if (at != more_.end() && at->start < added.stop) return false;
    if (at != more_.begin() && std::prev(at)->stop > added.start) return false;
    if (at != more_.begin() && std::prev(at)->stop == added.start) {
      std::prev(at)->stop = added.stop;
    } else {
      more_.insert(at, added);
    }
    return true;
  }

 private:
  wire::TokenRange first_;              // counts while `more_` is empty
  std::vector<wire::TokenRange> more_;  // all ranges, once there are several
};

}  // namespace hetkv::engine
