// The remap kernel: thread blocks take chunks in turn, then add up what they saw; the last one reports.
#pragma once

#include "backend/gpu/device.h"
//
#include "backend/gpu/block.h"

namespace hetkv::gpu {

// Sum over the thread block, in thread 0.
__device__ inline Partial block_sum(Partial partial) {
  constexpr std::uint32_t warps = kThreads / kWarp;
  __shared__ std::uint64_t checksums[warps];
  __shared__ std::uint32_t saturated[warps];
  HETKV_UNROLL
  for (std::uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    const std::uint64_t low = from_lane_above(static_cast<std::uint32_t>(partial.checksum), distance);
    const std::uint64_t high = from_lane_above(static_cast<std::uint32_t>(partial.checksum >> 32), distance);
    partial.checksum += high << 32 | low;
    partial.saturated += from_lane_above(partial.saturated, distance);
  }
  if (thread_index() % kWarp == 0) {
    checksums[thread_index() / kWarp] = partial.checksum;
    saturated[thread_index() / kWarp] = partial.saturated;
  }
  barrier();
  if (thread_index() == 0) {
    HETKV_UNROLL
    for (std::uint32_t i = 1; i < warps; ++i) {
      partial.checksum += checksums[i];
      partial.saturated += saturated[i];
    }
  }
  return partial;
}

// Adds to `scratch`. The last thread block writes what the blocks have found to `result` and clears `scratch` for the
// next launch. Without a `result` the sums stay for a launch that follows.
__device__ inline void report(const Partial& partial, std::uint32_t num_blocks, Scratch* scratch, RemapResult* result) {
  if (partial.checksum != 0) add(&scratch->checksum, partial.checksum);
  if (partial.saturated != 0) add(&scratch->saturated, static_cast<std::uint64_t>(partial.saturated));
  if (result == nullptr) return;
  fence();
  if (add(&scratch->blocks_done, 1u) + 1 != num_blocks) return;
  fence();
  volatile Scratch* sums = scratch;
  volatile RemapResult* out = result;
  out->checksum = sums->checksum;
  out->saturated = sums->saturated;
  sums->checksum = 0;
  sums->saturated = 0;
  sums->blocks_done = 0;
}

// Thread blocks that a multiprocessor has to hold. Conversions wait for arithmetic, so for them a third block is worth
// some registers; the kernel with everything in it would spill.
constexpr int blocks_wanted(Paths paths) {
  return paths == Paths::kRows ? 3 : 2;
}

template <Paths kPaths>
__global__ void HETKV_LAUNCH_BOUNDS(kThreads, blocks_wanted(kPaths))
    remap_kernel(HETKV_GRID_CONSTANT const Launch launch, std::uint32_t num_blocks, Scratch* scratch,
                 RemapResult* result) {
  wait_for_launch_before();
  Partial partial;
  for (std::uint32_t next = block_index(); next < launch.num_chunks; next += num_blocks) {
    std::uint32_t chunk = next;
    const Job& job = job_of(launch, chunk);
    run_chunk<kPaths>(job, launch.seed, chunk, thread_index(), partial);
  }
  let_next_launch_start();
  const Partial total = block_sum(partial);
  if (thread_index() == 0) report(total, num_blocks, scratch, result);
}

}  // namespace hetkv::gpu
