#include "remap/threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace hetkv::remap {
namespace {

constexpr int kMaxWorkers = 63;

class Pool {
 public:
  void run(int count, void (*body)(void*, int) noexcept, void* context) noexcept {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < count - 1 && workers_ < kMaxWorkers && start_worker()) ++workers_;
      body_ = body;
      context_ = context;
      count_ = count;
      next_ = 0;
      left_ = count;
    }
    work_.notify_all();
    std::unique_lock<std::mutex> lock(mutex_);
    take(lock);
    done_.wait(lock, [this] { return left_ == 0; });
    body_ = nullptr;
  }

  std::mutex& busy() { return busy_; }

 private:
  // Does indices until none is left. The lock is held on entry and on return.
  void take(std::unique_lock<std::mutex>& lock) {
    while (body_ != nullptr && next_ < count_) {
      const int index = next_++;
      auto* const body = body_;
      void* const context = context_;
      lock.unlock();
      body(context, index);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  bool start_worker() noexcept {
    try {
      std::thread([this] {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
          work_.wait(lock, [this] { return body_ != nullptr && next_ < count_; });
          take(lock);
        }
      }).detach();
      return true;
    } catch (...) {
      return false;
    }
  }

  std::mutex busy_;  // held by the caller whose work this is
  std::mutex mutex_;
  std::condition_variable work_, done_;
  void (*body_)(void*, int) noexcept = nullptr;
  void* context_ = nullptr;
  int count_ = 0;
  int next_ = 0;
  int left_ = 0;
  int workers_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// Never destroyed: its threads may outlive static destructors. A child process has none of them and starts its own.
Pool* pool() noexcept {
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    static const int at_fork =
        pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
    (void)at_fork;
    Pool* fresh = new (std::nothrow) Pool;
    if (fresh == nullptr) return nullptr;
    if (the_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) {
      current = fresh;
    } else {
      delete fresh;
    }
  }
  return current;
}

}  // namespace

void parallel(int count, void (*body)(void* context, int index) noexcept, void* context) noexcept {
  Pool* shared = count > 1 ? pool() : nullptr;
  if (shared != nullptr && shared->busy().try_lock()) {
    std::lock_guard<std::mutex> owned(shared->busy(), std::adopt_lock);
    shared->run(count, body, context);
    return;
  }
  for (int index = 0; index < count; ++index) body(context, index);
}

}  // namespace hetkv::remap
