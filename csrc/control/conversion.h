// How one segment travels between two layouts with static scales or none: the first part of
// hetkv/control/conversion.py in C++. tests/capi compares the two.
#pragma once

#include <string>
#include <vector>

#include "control/model.h"

namespace hetkv::control {

// The first field that keeps two ranks from exchanging KV, and both sides' values as this side sees them.
struct Incompatible {
  std::string field;
  std::string mine;
  std::string theirs;
  std::string why;

  bool found() const { return !field.empty(); }
};

struct Conversion {
  DType wire = DType::kUInt8;
  std::vector<double> pack;  // per head of the route; empty: 1.0
  std::vector<double> unpack;
};

// For the global `heads` of a route; `src_heads` and `dst_heads` are those of the whole layouts. What is found in
// `mismatch` has the sender's value as `mine`.
Conversion segment_conversion(const SegmentLayout& src, const SegmentLayout& dst, const Interval& heads,
                              const Interval& src_heads, const Interval& dst_heads, Incompatible* mismatch);

}  // namespace hetkv::control
