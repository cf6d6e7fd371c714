// Functions of the backend's table about remaps: their slots, and their launches.
#include <algorithm>
#include <atomic>
#include <cstddef>
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

// Up to so many chunks the blocks read the table over the bus instead of from a copy. An estimate, not measured.
constexpr std::uint32_t kReadOverBus = 64;

// What a slot's scratch is.
struct SlotMemory {
  Scratch* sums = nullptr;  // device memory
  Table* table = nullptr;   // device memory
  Table* twin = nullptr;    // pinned host memory
};

std::int32_t make(std::int32_t device, SlotMemory* made) {
  void* pointer = nullptr;
  std::int32_t status = device_alloc(device, sizeof(Scratch), &pointer);
  if (status != kHetkvOk) return status;
  made->sums = static_cast<Scratch*>(pointer);
  status = device_alloc(device, sizeof(Table), &pointer);
  if (status != kHetkvOk) return status;
  made->table = static_cast<Table*>(pointer);
  status = host_alloc(sizeof(Table), &pointer);
  if (status != kHetkvOk) return status;
  made->twin = static_cast<Table*>(pointer);
  // A stream of its own: the null stream may be the caller's, and wait for what only this process can do.
  void* stream = nullptr;
  status = stream_create(device, 1, &stream);
  if (status != kHetkvOk) return status;
  status = report(gpuMemsetAsync(made->sums, 0, sizeof(Scratch), as_stream(stream)), "clearing a slot");
  if (status == kHetkvOk) status = stream_synchronize(stream);
  static_cast<void>(stream_destroy(stream));
  return status;
}

std::int32_t load_kernels() {
  HETKV_TRY(load<Paths::kMoves>());
  HETKV_TRY(load<Paths::kTurns>());
  HETKV_TRY(load<Paths::kRows>());
  HETKV_TRY(load<Paths::kGroups>());
  HETKV_TRY(load<Paths::kAll>());
  return kHetkvOk;
}

void drop(SlotMemory* memory) {
  if (memory->sums != nullptr) static_cast<void>(gpuFree(memory->sums));
  if (memory->table != nullptr) static_cast<void>(gpuFree(memory->table));
  if (memory->twin != nullptr) static_cast<void>(gpuHostFree(memory->twin));
  delete memory;
}

}  // namespace

std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot) {
  *slot = HetkvRemapSlot{};
  slot->device = device;
  void* results = nullptr;
  HETKV_ON(device);
  std::int32_t status = load_kernels();
  if (status != kHetkvOk) return status;
  status = host_alloc(kHetkvMaxFrames * sizeof(HetkvRemapResult), &results);
  if (status != kHetkvOk) return status;
  auto* memory = new (std::nothrow) SlotMemory;
  status = memory != nullptr ? make(device, memory) : fail(kHetkvOutOfMemory, "no memory for a slot");
  if (status != kHetkvOk) {
    if (memory != nullptr) drop(memory);
    static_cast<void>(gpuHostFree(results));
    return status;
  }
  slot->results = new (results) HetkvRemapResult[kHetkvMaxFrames]();
  slot->scratch = memory;
  return kHetkvOk;
}

std::int32_t slot_destroy(HetkvRemapSlot* slot) {
  if (slot->results == nullptr) return kHetkvOk;
  HETKV_ON(slot->device);
  drop(static_cast<SlotMemory*>(slot->scratch));
  HETKV_TRY(gpuHostFree(const_cast<HetkvRemapResult*>(slot->results)));
  *slot = HetkvRemapSlot{};
  return kHetkvOk;
}

std::int32_t remap(void* stream, const remap::Job* jobs, const HetkvRemapFrame* frames, std::size_t num_frames,
                   const HetkvRemapSlot* slot, std::int32_t max_blocks) {
  HETKV_ON(slot->device);
  std::size_t num_jobs = 0;
  for (std::size_t i = 0; i < num_frames; ++i) num_jobs += frames[i].num_jobs;
  if (num_frames > kHetkvMaxFrames || num_jobs > kHetkvMaxJobs) return fail(kHetkvInvalid, "too many jobs at once");
  if (!std::all_of(jobs, jobs + num_jobs, can_plan)) return fail(kHetkvInvalid, "a remap that is too large");
  const SlotMemory& memory = *static_cast<const SlotMemory*>(slot->scratch);
  Launch launch;
  launch.num_frames = static_cast<std::uint32_t>(num_frames);
  launch.num_jobs = static_cast<std::uint32_t>(num_jobs);
  const bool table = num_jobs > kMaxLaunchJobs;
  Job* planned = table ? memory.twin->jobs : launch.jobs;
  launch.num_chunks =
      plan_jobs(jobs, frames, num_frames, planned, table ? memory.twin->first_chunk : launch.first_chunk);
  if (table) {
    launch.table = memory.twin;
    if (launch.num_chunks > kReadOverBus) {
      launch.table = memory.table;
      const std::size_t bytes = offsetof(Table, jobs) + num_jobs * sizeof(Job);
      HETKV_TRY(gpuMemcpyAsync(memory.table, memory.twin, bytes, gpuMemcpyDefault, as_stream(stream)));
    }
  }
  const auto begin = [&](auto function) {
    auto* results = const_cast<HetkvRemapResult*>(slot->results);
    return function(launch, multiprocessors_of(slot->device), max_blocks, memory.sums, results, as_stream(stream));
  };
  switch (paths_of(planned, num_jobs)) {
    case Paths::kMoves:
      HETKV_TRY(begin(start<Paths::kMoves>));
      break;
    case Paths::kTurns:
      HETKV_TRY(begin(start<Paths::kTurns>));
      break;
    case Paths::kRows:
      HETKV_TRY(begin(start<Paths::kRows>));
      break;
    case Paths::kGroups:
      HETKV_TRY(begin(start<Paths::kGroups>));
      break;
    case Paths::kAll:
      HETKV_TRY(begin(start<Paths::kAll>));
      break;
  }
  return kHetkvOk;
}

}  // namespace hetkv::gpu
