// A stock of handles: while a driver takes its time to make one, all others can be taken and given back.
#include "backend/gpu/stock.h"

#include <condition_variable>
#include <mutex>
#include <thread>

#undef NDEBUG
#include <cassert>

namespace {

using Handle = int*;
std::mutex mutex;
std::condition_variable changed;
bool making = false, ready = false;

std::int32_t make(bool slow, Handle* made) {
  *made = new int(0);
  std::unique_lock<std::mutex> lock(mutex);
  if (slow) {
    making = true;
    changed.notify_all();
    changed.wait(lock, [] { return ready; });
  }
  return kHetkvOk;
}

}  // namespace

int main() {
  auto& stock = *new hetkv::gpu::Stock<Handle>(make, 2);
  void *slow = nullptr, *first = nullptr, *second = nullptr;
  std::thread other([&] { assert(stock.take(0, true, &slow) == kHetkvOk); });
  {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [] { return making; });
  }
  assert(stock.take(0, false, &first) == kHetkvOk);
  assert(stock.give_back(static_cast<Handle>(first), true) == kHetkvOk);
  assert(stock.give_back(static_cast<Handle>(first), true) == kHetkvInvalid);
  assert(stock.take(0, false, &second) == kHetkvOk && second == first);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    ready = true;
  }
  changed.notify_all();
  other.join();
  assert(slow != nullptr && slow != first);
}
