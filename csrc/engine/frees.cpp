#include "engine/frees.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "engine/device.h"

namespace hetkv::engine {
namespace {

using Key = std::tuple<const HetkvBackend*, int, void*>;

struct Frees {
  std::mutex mutex;
  std::map<Key, std::size_t> waits;  // of each stream that waits
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
  if (all.waits.empty()) {
    call();
  } else {
    all.put_off.push_back(std::move(call));
  }
}

Status make_stream_wait(const Device& device, void* stream, const std::function<Status()>& enqueue) {
  const Key key{&device.backend(), device.index(), stream};
  Frees& all = frees();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto others = std::count_if(all.waits.begin(), all.waits.end(), [&](const auto& wait) {
    return std::get<0>(wait.first) == std::get<0>(key) && std::get<1>(wait.first) == std::get<1>(key);
  });
  const std::int32_t queues = device.info().stream_queues;
  if (queues > 0 && others + 2 >= queues && all.waits.count(key) == 0) {
    return Status::error(
        Code::kUnsupported,
        std::to_string(others) + " streams of the device wait for transfers, and it has " + std::to_string(queues) +
            " hardware queues, two of which stay free: one more could hold up the transfers. Let fewer "
            "streams wait, or raise "
            "CUDA_DEVICE_MAX_CONNECTIONS (32 at most) or GPU_MAX_HW_QUEUES before the driver starts");
  }
  auto status = enqueue();
  if (status.ok()) ++all.waits[key];
  return status;
}

void streams_go_on(const std::vector<WaitingStream>& waits) {
  if (waits.empty()) return;
  Frees& all = frees();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (const auto& [backend, device, stream] : waits) {
    const auto found = all.waits.find(Key{backend, device, stream});
    if (found != all.waits.end() && --found->second == 0) all.waits.erase(found);
  }
  if (!all.waits.empty()) return;
  for (const auto& call : std::exchange(all.put_off, {})) call();
}

}  // namespace hetkv::engine
