// What two ranks agree on: whether they fit, the routes between them, and how each segment travels. The rules of
// hetkv/control/compat.py and hetkv/control/agreement.py (docs/control-channel.md is normative), for static scales.
#pragma once

#include <cstdint>
#include <vector>

#include "control/conversion.h"
#include "control/model.h"
#include "control/routes.h"

namespace hetkv::control {

// One layer of a route between the two ranks; conversions in the order of the spec's segments.
struct LayerRoute {
  std::int64_t layer = 0;
  Interval heads;
  std::vector<Conversion> conversions;
};

struct Agreement {
  std::vector<LayerRoute> layers;   // in rising layer order; empty where replicas leave nothing for this pair
  std::vector<std::int64_t> ranks;  // of the peer's instance that hold something this rank holds too
};

// Both descriptions have been checked. Not found() where they fit.
Incompatible agree(const Description& mine, const Description& theirs, Agreement* out);

}  // namespace hetkv::control
