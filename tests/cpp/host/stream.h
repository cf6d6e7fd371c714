// A stream is a thread that executes its queue in order; an event is done when the queue has come to it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace hetkv::host {

// One recording of an event: who waits for it is not concerned by later ones.
struct Point {
  std::atomic<bool> reached{false};
  std::atomic<std::uint64_t> at_ns{0};
  std::atomic<bool> failed{false};
};
class Event {
 public:
  std::shared_ptr<Point> point() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return point_;
  }
  std::shared_ptr<Point> record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return point_ = std::make_shared<Point>();
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Point> point_ = [] {
    auto none = std::make_shared<Point>();
    none->reached = true;
    return none;
  }();
};

class Stream {
 public:
  explicit Stream(int device) : device(device), thread_([this] { run(); }) {}
  ~Stream() {
    put(nullptr);
    thread_.join();
  }
  void put(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !running_; });
  }
  const int device;
  std::atomic<bool> capturing{false};

 private:
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        running_ = false;
        changed_.notify_all();
        changed_.wait(lock, [this] { return !queue_.empty(); });
        work = std::move(queue_.front());
        queue_.pop_front();
        running_ = true;
      }
      if (!work) return;
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool running_ = false;
  std::thread thread_;
};

}  // namespace hetkv::host
