// The remap kernel: thread blocks take chunks in turn, then add up what they saw.
#pragma once

#include "backend/gpu/device.h"
//
#include "backend/gpu/block.h"

namespace hetkv::gpu {

// Sum over the threads of a warp, in its first lane.
__device__ inline Partial warp_sum(Partial partial) {
  HETKV_UNROLL
  for (std::uint32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    const std::uint64_t low = from_lane_above(static_cast<std::uint32_t>(partial.checksum), distance);
    const std::uint64_t high = from_lane_above(static_cast<std::uint32_t>(partial.checksum >> 32), distance);
    partial.checksum += high << 32 | low;
    partial.saturated += from_lane_above(partial.saturated, distance);
  }
  return partial;
}

// Adds what a thread block found to `scratch`: three numbers, each by a thread of its own. The last to add to a number
// knows the sum, so no fence is needed: it writes that to `result` and clears the number for the next launch. Without a
// `result` the sums stay for a launch that follows.
__device__ inline void add_up(Partial partial, std::uint32_t num_blocks, Scratch* scratch, HetkvRemapResult* result) {
  constexpr std::uint32_t warps = kThreads / kWarp;
  __shared__ std::uint64_t checksums[warps];
  __shared__ std::uint32_t saturated[warps];
  partial = warp_sum(partial);
  if (thread_index() % kWarp == 0) {
    checksums[thread_index() / kWarp] = partial.checksum;
    saturated[thread_index() / kWarp] = partial.saturated;
  }
  barrier();
  const std::uint32_t number = thread_index();
  if (number >= kNumbers) return;
  partial = Partial{};
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < warps; ++i) {
    partial.checksum += checksums[i];
    partial.saturated += saturated[i];
  }
  const std::uint64_t found = number == 0   ? partial.checksum & 0xFFFFFFFFu
                              : number == 1 ? partial.checksum >> 32
                                            : partial.saturated;
  if (result == nullptr) {
    if (found != 0) add(&scratch->before[number], found);
    return;
  }
  const std::uint64_t mine = kOneBlock | found;
  const std::uint64_t sum = add(&scratch->now[number], mine) + mine;
  if (sum / kOneBlock != num_blocks) return;
  volatile std::uint64_t* out = number == 0 ? &result->low : number == 1 ? &result->high : &result->saturated;
  *out = sum % kOneBlock + scratch->before[number];
  scratch->before[number] = 0;
  scratch->now[number] = 0;
}

// Thread blocks that a multiprocessor has to hold: more wait for memory at once, and have fewer registers each. A fifth
// made moves no faster and conversions spill.
constexpr int blocks_wanted(Paths paths) {
  return paths == Paths::kMoves || paths == Paths::kRows ? 4 : 2;
}

template <Paths kPaths>
__global__ void HETKV_LAUNCH_BOUNDS(kThreads, blocks_wanted(kPaths))
    remap_kernel(HETKV_GRID_CONSTANT const Launch launch, std::uint32_t num_blocks, Scratch* scratch,
                 HetkvRemapResult* result) {
  wait_for_launch_before();
  Partial partial;
  for (std::uint32_t next = block_index(); next < launch.num_chunks; next += num_blocks) {
    std::uint32_t chunk = next;
    const Job& job = job_of(launch, chunk);
    run_chunk<kPaths>(job, launch.seed, chunk, thread_index(), partial);
  }
  let_next_launch_start();
  add_up(partial, num_blocks, scratch, result);
}

}  // namespace hetkv::gpu
