// Handles of the driver that are made ahead, and kept for the next taker once given back.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/gpu/status.h"

namespace hetkv::gpu {

// While a stream of the process waits for the host, the driver at times makes a new stream or event only after it:
// where it has to grow what they are made of. So they are made `at_once` at a time, and nodes that start meanwhile take
// theirs from here. Of all threads. Never destroyed: what it holds belongs to the driver when the process ends.
template <typename Handle>
class Stock {
 public:
  using Kind = std::pair<std::int32_t, bool>;  // device, and which of two sorts
  // Makes one handle of the sort on the current device.
  using Make = std::int32_t (*)(bool sort, Handle* made);

  Stock(Make make, int at_once) : make_(make), at_once_(at_once) {}

  std::int32_t take(std::int32_t device, bool sort, void** handle) {
    const Kind kind{device, sort};
    if (hand_out(kind, handle, {})) return kHetkvOk;
    std::vector<Handle> made;
    const std::int32_t status = make_some(device, sort, &made);
    return hand_out(kind, handle, made) ? kHetkvOk : status;
  }

  // One that is not to be `kept` is the caller's to destroy then.
  std::int32_t give_back(Handle handle, bool kept) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = taken_.find(handle);
    if (taken == taken_.end()) return fail(kHetkvInvalid, "a handle that this backend did not make");
    if (kept) idle_[taken->second].push_back(handle);
    taken_.erase(taken);
    return kHetkvOk;
  }

 private:
  bool hand_out(const Kind& kind, void** handle, const std::vector<Handle>& made) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& idle = idle_[kind];
    idle.insert(idle.end(), made.begin(), made.end());
    if (idle.empty()) return false;
    taken_.emplace(idle.back(), kind);
    *handle = idle.back();
    idle.pop_back();
    return true;
  }

  // Without the lock: while the driver waits, other threads, which may be what it waits for, take and give back.
  std::int32_t make_some(std::int32_t device, bool sort, std::vector<Handle>* made) {
    HETKV_ON(device);
    for (int count = 0; count < at_once_; ++count) {
      Handle one;
      const std::int32_t status = make_(sort, &one);
      if (status != kHetkvOk) return status;
      made->push_back(one);
    }
    return kHetkvOk;
  }

  const Make make_;
  const int at_once_;
  std::mutex mutex_;
  std::map<Kind, std::vector<Handle>> idle_;
  std::map<Handle, Kind> taken_;
};

}  // namespace hetkv::gpu
