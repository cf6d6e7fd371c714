// What the progress thread tells: what is watched for (outcome.h), failures and ends of links, through a queue
// that a thread sleeps on; and spans of time for pictures. Both are thread safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "status.h"

namespace hetkv::engine {

enum class EventKind : std::uint8_t {
  kLayer = 1,        // receiver: `layer` of request `handle` is verified and in the pool
  kComplete = 2,     // receiver: all layers of the request are; sender: the receiver said so on every route
  kPacked = 3,       // sender: no more reads of the request's blocks will happen
  kFailed = 4,       // the request ended with `status`; nothing of this side touches its blocks any more
  kLinkLost = 5,     // `link` ended with `status`
  kLinkDrained = 6,  // after kLinkLost: nothing of this side touches the peer's memory any more
};

struct Event {
  EventKind kind = EventKind::kLayer;
  std::uint64_t handle = 0;
  std::uint32_t link = 0;
  std::int32_t layer = -1;
  Status status;
};

class EventQueue {
 public:
  void push(Event event) {
    bool first = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      first = events_.empty();
      events_.push_back(std::move(event));
    }
    if (first) ready_.notify_one();  // the thread woken for the first takes all that came since
  }
  // Sleeps until there are events or the queue is closed; empty then and only then.
  std::vector<Event> wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait(lock, [this] { return !events_.empty() || closed_; });
    return std::exchange(events_, {});
  }
  // What there is, without waiting.
  std::vector<Event> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(events_, {});
  }
  void close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    ready_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::vector<Event> events_;
  bool closed_ = false;
};

enum class SpanKind : std::uint8_t { kPack = 1, kWire = 2, kUnpack = 3 };

struct Span {
  SpanKind kind = SpanKind::kPack;
  std::uint64_t handle = 0;
  std::uint32_t layer = 0;
  std::uint64_t start_ns = 0;  // CLOCK_MONOTONIC
  std::uint64_t stop_ns = 0;
  std::uint64_t bytes = 0;
};

class Trace {
 public:
  explicit Trace(bool on) : on_(on) {}
  void add(const Span& span) {
    if (!on_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    spans_.push_back(span);
  }
  std::vector<Span> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(spans_, {});
  }

 private:
  const bool on_;
  std::mutex mutex_;
  std::vector<Span> spans_;
};

}  // namespace hetkv::engine
