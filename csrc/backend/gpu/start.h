// The body of `start`, for the source file of each kernel.
#pragma once

#include <algorithm>
#include <atomic>

#include "backend/gpu/kernel.h"
#include "backend/gpu/launch.h"

namespace hetkv::gpu {

// Thread blocks that run at once on one multiprocessor. It does not change, so the driver is asked once.
template <Paths kPaths, bool kTable>
int blocks_at_once() {
  static std::atomic<int> known{0};
  int blocks = known.load(std::memory_order_relaxed);
  if (blocks == 0) {
    const gpuError_t error =
        gpuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, remap_kernel<kPaths, kTable>, kThreads, 0);
    if (error != gpuSuccess || blocks < 1) blocks = 1;
    known.store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <Paths kPaths, bool kTable>
gpuError_t start_kernel(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch,
                        HetkvRemapResult* results, gpuStream_t stream) {
  std::uint32_t blocks = static_cast<std::uint32_t>(multiprocessors * blocks_at_once<kPaths, kTable>());
  if (max_blocks > 0) blocks = std::min(blocks, static_cast<std::uint32_t>(max_blocks));
  blocks = std::max(1u, std::min(blocks, launch.num_chunks));
  return vendor::launch(remap_kernel<kPaths, kTable>, blocks, kThreads, stream, launch, blocks, scratch, results);
}

template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, HetkvRemapResult* results,
                 gpuStream_t stream) {
  const auto begin = launch.table != nullptr ? start_kernel<kPaths, true> : start_kernel<kPaths, false>;
  return begin(launch, multiprocessors, max_blocks, scratch, results, stream);
}

template <Paths kPaths>
gpuError_t load() {
  gpuFuncAttributes ignored;
  const gpuError_t error = gpuFuncGetAttributes(&ignored, reinterpret_cast<const void*>(remap_kernel<kPaths, false>));
  if (error != gpuSuccess) return error;
  return gpuFuncGetAttributes(&ignored, reinterpret_cast<const void*>(remap_kernel<kPaths, true>));
}

}  // namespace hetkv::gpu
