// Which rank sends what to which rank: hetkv/kv/reshard.py in C++. tests/capi compares the two.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "control/model.h"

namespace hetkv::control {

// Layers and heads, global, that one source rank sends to one destination rank.
struct Route {
  std::int64_t source = 0;
  std::int64_t destination = 0;
  Interval layers;
  Interval heads;
};

// Routes that write every element of every destination once, in order of destination, source, layer, head. Shards have
// been checked. kInvalid where a destination needs heads that no source holds.
Status routes(const Spec& spec, const std::vector<Shard>& sources, const std::vector<Shard>& destinations,
              std::vector<Route>* out);

// (layer, heads) that both shards hold, of layers with a cache of their own.
std::vector<std::pair<std::int64_t, Interval>> overlap(const Spec& spec, const Shard& a, const Shard& b);

}  // namespace hetkv::control
