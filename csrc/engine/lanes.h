// What a sender still has to send: requests, their parts for each link (lanes), and the order in which a link's lanes
// are served. Progress thread only.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/device.h"
#include "engine/link.h"
#include "engine/mover.h"
#include "engine/outcome.h"
#include "engine/ranges.h"

namespace hetkv::engine {

// Layers that one call of the caller's says are in the pool, of any number of requests: computed once `after` has
// happened. All items of a wave become ready together.
struct Wave {
  After after;
  std::vector<std::uint64_t> requests;  // handles of those that wait for it
  bool admitted = false;                // may be launched in a stream after `after`
  bool computed() const { return after == nullptr; }
};

struct Ready {
  std::uint32_t layer = 0;
  std::uint64_t start = 0;
  std::uint64_t stop = 0;
  std::shared_ptr<Wave> wave;  // null: computed
};

struct SendRequest;

// One ticket on one link. `remaining` counts tokens over all plans that are not packed yet, `unsent` those that are in
// no bundle yet.
struct Lane {
  enum class Place : std::uint8_t { kNone, kReady, kAhead };  // in its link's queues

  SendRequest* request = nullptr;
  std::shared_ptr<Link> link;
  std::uint64_t epoch = 0;
  std::vector<wire::TokenRange> want;
  std::uint64_t arrival = 0;  // rises from lane to lane
  std::uint64_t remaining = 0;
  std::uint64_t unsent = 0;
  std::size_t ready = 0;        // cursor: next ready item,
  std::size_t plan = 0;         // plan of the link,
  std::uint64_t token = 0;      // and token inside it
  std::uint32_t in_flight = 0;  // frames
  std::uint64_t frames = 0;     // committed
  std::uint64_t bytes = 0;
  Place place = Place::kNone;
  std::uint64_t placed_unsent = 0;  // `unsent` when it was placed
  bool delivered = false;           // the receiver said so
  bool cancelled = false;           // counts for nothing any more; goes with its request

  // Moves the cursor to the next tokens that were sent and are wanted, computed or not; false: there are none yet.
  bool find_next(wire::TokenRange* tokens);
};

struct SendRequest {
  std::shared_ptr<Outcome> outcome;
  std::uint64_t handle = 0;
  wire::RequestId id{};
  std::vector<wire::TokenRange> tokens;
  std::vector<BlockTable> blocks;
  std::optional<wire::Content> content;
  std::vector<Ready> ready;
  std::vector<RangeSet> sent;  // the same by layer
  std::list<Lane> lanes;
  std::int32_t priority = 0;  // lower ones go first
  std::uint64_t deadline_ns = 0;
  std::uint32_t packing = 0;  // frames whose pack is in flight
  bool packed = false;
  Status failure;  // not ok: ends once nothing is in flight
};

// Lanes of one link that have something to send, those of the lowest priority number before all others. Among these
// every other bundle goes to the lane that came first, so that equal requests end one after another and none waits for
// ever; the others go to the lane that has least left, so that a small request does not wait for a large one.
class LaneQueue {
 public:
  using InOrder = std::set<std::tuple<std::int32_t, std::uint64_t, Lane*>>;  // priority, arrival

  bool empty() const { return by_arrival_.empty(); }
  void add(Lane& lane) {
    lane.placed_unsent = lane.unsent;
    by_arrival_.emplace(lane.request->priority, lane.arrival, &lane);
    by_left_.emplace(lane.request->priority, lane.placed_unsent, lane.arrival, &lane);
  }
  void remove(Lane& lane) {
    by_arrival_.erase({lane.request->priority, lane.arrival, &lane});
    by_left_.erase({lane.request->priority, lane.placed_unsent, lane.arrival, &lane});
  }
  Lane& first() const { return *std::get<2>(*by_arrival_.begin()); }
  Lane& shortest() const { return *std::get<3>(*by_left_.begin()); }

  const InOrder& in_order() const { return by_arrival_; }

 private:
  InOrder by_arrival_;
  std::set<std::tuple<std::int32_t, std::uint64_t, std::uint64_t, Lane*>> by_left_;
};

}  // namespace hetkv::engine
