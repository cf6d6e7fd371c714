// The body of `start`, for the source file of each kernel.
#pragma once

#include <algorithm>
#include <atomic>

#include "backend/gpu/kernel.h"
#include "backend/gpu/launch.h"

namespace hetkv::gpu {

// Thread blocks that run at once on one multiprocessor. It does not change, so the driver is asked once.
template <Paths kPaths>
int blocks_at_once(std::uint32_t shared) {
  static std::atomic<int> known[kTileElements * 4 / 4096 + 1];
  std::atomic<int>& slot = known[shared / 4096];
  int blocks = slot.load(std::memory_order_relaxed);
  if (blocks == 0) {
    const gpuError_t error =
        gpuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, remap_kernel<kPaths>, kThreads, shared);
    if (error != gpuSuccess || blocks < 1) blocks = 1;
    slot.store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, RemapResult* result,
                 gpuStream_t stream) {
  const std::uint32_t shared = shared_bytes(launch);
  std::uint32_t blocks = static_cast<std::uint32_t>(multiprocessors * blocks_at_once<kPaths>(shared));
  if (max_blocks > 0) blocks = std::min(blocks, static_cast<std::uint32_t>(max_blocks));
  blocks = std::max(1u, std::min(blocks, launch.num_chunks));
  remap_kernel<kPaths><<<blocks, kThreads, shared, stream>>>(launch, blocks, scratch, result);
  return gpuGetLastError();
}

}  // namespace hetkv::gpu
