// Functions of the backend's table about remaps: their slots, and their launches.
#include <algorithm>
#include <atomic>
#include <new>

#include "backend/gpu/functions.h"
#include "backend/gpu/launch.h"
#include "backend/gpu/status.h"

namespace hetkv::gpu {
namespace {

int multiprocessors_of(int device) {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  int count = device < kKnown ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    if (gpuDeviceGetAttribute(&count, vendor::kMultiprocessors, device) != gpuSuccess || count < 1) count = 1;
    if (device < kKnown) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace

std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot) {
  *slot = HetkvRemapSlot{};
  slot->device = device;
  void* result = nullptr;
  std::int32_t status = host_alloc(sizeof(HetkvRemapResult), &result);
  if (status != kHetkvOk) return status;
  status = device_alloc(device, sizeof(Scratch), &slot->scratch);
  if (status == kHetkvOk) {
    const Current current(device);
    status = report(gpuMemsetAsync(slot->scratch, 0, sizeof(Scratch), nullptr), "clearing a slot");
    if (status == kHetkvOk) status = report(gpuStreamSynchronize(nullptr), "clearing a slot");
    if (status != kHetkvOk) static_cast<void>(gpuFree(slot->scratch));
  }
  if (status != kHetkvOk) {
    static_cast<void>(gpuHostFree(result));
    return status;
  }
  slot->result = new (result) HetkvRemapResult{};
  return kHetkvOk;
}

std::int32_t slot_destroy(HetkvRemapSlot* slot) {
  if (slot->result == nullptr) return kHetkvOk;
  HETKV_ON(slot->device);
  HETKV_TRY(gpuFree(slot->scratch));
  HETKV_TRY(gpuHostFree(const_cast<HetkvRemapResult*>(slot->result)));
  *slot = HetkvRemapSlot{};
  return kHetkvOk;
}

std::int32_t remap(void* stream, const remap::Job* jobs, std::size_t num_jobs, std::uint64_t seed,
                   const HetkvRemapSlot* slot, std::int32_t max_blocks) {
  HETKV_ON(slot->device);
  if (std::any_of(jobs, jobs + num_jobs, [](const remap::Job& job) { return job.scaled(); })) {
    return fail(kHetkvUnsupported, "scales per token or head cannot be converted on a device yet");
  }
  if (!std::all_of(jobs, jobs + num_jobs, can_plan)) return fail(kHetkvInvalid, "a remap of 2^30 tokens or more");
  const int multiprocessors = multiprocessors_of(slot->device);
  Scratch* scratch = static_cast<Scratch*>(slot->scratch);
  std::size_t first = 0;
  do {
    const Launch launch = plan_launch(jobs + first, num_jobs - first, seed);
    first += launch.num_jobs;
    HetkvRemapResult* result = first == num_jobs ? const_cast<HetkvRemapResult*>(slot->result) : nullptr;
    const auto begin = [&](auto function) {
      return function(launch, multiprocessors, max_blocks, scratch, result, as_stream(stream));
    };
    switch (paths_of(launch)) {
      case Paths::kMoves:
        HETKV_TRY(begin(start<Paths::kMoves>));
        break;
      case Paths::kTurns:
        HETKV_TRY(begin(start<Paths::kTurns>));
        break;
      case Paths::kRows:
        HETKV_TRY(begin(start<Paths::kRows>));
        break;
      case Paths::kAll:
        HETKV_TRY(begin(start<Paths::kAll>));
        break;
    }
  } while (first < num_jobs);
  return kHetkvOk;
}

}  // namespace hetkv::gpu
