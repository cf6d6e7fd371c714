#include "engine/frees.h"

#include <mutex>
#include <utility>
#include <vector>

namespace hetkv::engine {
namespace {

struct Frees {
  std::mutex mutex;
  std::size_t waiting_streams = 0;
  std::vector<std::function<void()>> put_off;
};

// Never destroyed: what is still put off when the process ends belongs to its driver then.
Frees& frees() {
  static auto* const all = new Frees;
  return *all;
}

}  // namespace

void free_when_no_stream_waits(std::function<void()> call) {
  Frees& all = frees();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.waiting_streams == 0) {
    call();
  } else {
    all.put_off.push_back(std::move(call));
  }
}

Status make_stream_wait(const std::function<Status()>& enqueue) {
  Frees& all = frees();
  const std::lock_guard<std::mutex> lock(all.mutex);
  auto status = enqueue();
  if (status.ok()) ++all.waiting_streams;
  return status;
}

void gates_opened(std::size_t count) {
  if (count == 0) return;
  Frees& all = frees();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.waiting_streams -= count;
  if (all.waiting_streams > 0) return;
  for (const auto& call : std::exchange(all.put_off, {})) call();
}

}  // namespace hetkv::engine
