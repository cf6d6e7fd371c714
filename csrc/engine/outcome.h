// What becomes of a request, for its callers: the progress thread keeps it, any thread reads it and waits for it. No
// thread stands between the two, and nothing is allocated or woken where no thread waits.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "engine/id_hash.h"
#include "status.h"
#include "wire/message.h"

namespace hetkv::engine {

enum class Phase : std::uint32_t {
  kOpen = 0,
  kPacked = 1,    // sender: the request's blocks are not read any more
  kComplete = 2,  // sender: every receiver has its part; receiver: every layer is verified and in the pool
  kFailed = 3,    // nothing of this side touches the request's blocks any more
};

class Outcome {
 public:
  // What a caller gets events of (events.h), in addition to asking; kFailed always has one.
  enum Watch : std::uint32_t { kWatchEnd = 1, kWatchPacked = 2, kWatchLayers = 4, kWatchEvents = 7, kWatchStreams = 8 };

  // Layers are global, below `num_layers`. `spin_ns`: how long a caller spins in `wait` before it sleeps.
  Outcome(std::uint64_t number, const wire::RequestId& of, std::size_t num_layers, std::uint64_t spin_ns);

  const std::uint64_t handle;
  const wire::RequestId id;

  Phase phase() const { return phase_.load(); }
  bool ended() const { return phase() >= Phase::kComplete; }
  // Why it failed; once `phase` is kFailed.
  const Status& failure() const { return failure_; }
  // The layer is verified and in the pool.
  bool arrived(std::size_t layer) const {
    return layer / 64 < layers_.size() && (layers_[layer / 64].load() >> layer % 64 & 1) != 0;
  }

  // Waits until the phase is `least` or a later one, or until `deadline_ns` of the host's clock (clock.h); false: it is
  // not. Spins first, unless `slept` says that an earlier call has.
  bool wait(Phase least, std::uint64_t deadline_ns, bool slept = false) const;
  // Until the layer has arrived or the request has ended.
  bool wait_layer(std::size_t layer, std::uint64_t deadline_ns, bool slept = false) const;

  // From now on it has events. What has happened before this returns may have no event: look once more.
  void watch(std::uint32_t what) { watched_.fetch_or(what); }
  bool watched(std::uint32_t what) const { return (watched_.load() & what) != 0; }

  // Progress thread only.
  void arrive(std::size_t layer);
  void advance(Phase to);

 private:
  friend class Outcomes;
  // For threads that sleep until something changes. A thread that changes it writes it, and then looks for sleepers; a
  // sleeper says that it is one, and then looks at what it is, both in one total order.
  struct Word {
    std::atomic<std::uint32_t> value{0};
    std::atomic<std::uint32_t> sleepers{0};
    void change();
  };
  template <typename There>
  bool wait_for(Word& word, There there, std::uint64_t deadline_ns, bool slept) const;

  const std::uint64_t spin_ns_;
  std::atomic<Phase> phase_{Phase::kOpen};
  mutable Word phase_changes_;
  Status failure_;  // written before `phase_` says kFailed
  // What the progress thread reads for each layer is separate from what callers spin on.
  alignas(64) mutable Word layer_changes_;
  std::atomic<std::uint32_t> watched_{0};
  std::vector<std::atomic<std::uint64_t>> layers_;
};

// The requests of an engine. Thread safe.
class Outcomes {
 public:
  Outcomes(std::size_t num_layers, std::uint64_t spin_ns);

  // A request under a new handle; null: one with this id is under way.
  std::shared_ptr<Outcome> open(const wire::RequestId& id);
  // Its id may be used again; `failure` not ok: it failed. Callers are woken.
  void end(Outcome& outcome, Status failure);
  // As if it had never been opened.
  void forget(const Outcome& outcome);
  // The same for all that are left: no caller waits forever.
  void end_all(const Status& failure);

  std::size_t size() const;
  // Handles of requests that have ended since the last call, in the order of their ends.
  std::vector<std::uint64_t> take_ended();

 private:
  const std::size_t num_layers_;
  const std::uint64_t spin_ns_;
  mutable std::mutex mutex_;
  std::uint64_t next_handle_ = 1;
  std::unordered_map<wire::RequestId, std::shared_ptr<Outcome>, IdHash> open_;
  std::vector<std::uint64_t> ended_;
  std::atomic<bool> any_ended_{false};
};

}  // namespace hetkv::engine
