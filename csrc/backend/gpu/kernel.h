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

// Adds what a thread block found of a frame to `scratch`.
__device__ inline void add_up(Partial partial, std::uint32_t frame, Scratch* scratch) {
  constexpr std::uint32_t warps = kThreads / kWarp;
  __shared__ std::uint64_t checksums[warps];
  __shared__ std::uint32_t saturated[warps];
  partial = warp_sum(partial);
  barrier();  // those of the frame before have been read
  if (thread_index() % kWarp == 0) {
    checksums[thread_index() / kWarp] = partial.checksum;
    saturated[thread_index() / kWarp] = partial.saturated;
  }
  barrier();
  if (thread_index() >= 2) return;
  partial = Partial{};
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < warps; ++i) {
    partial.checksum += checksums[i];
    partial.saturated += saturated[i];
  }
  const std::uint64_t found = thread_index() == 0 ? partial.checksum : partial.saturated;
  if (found != 0) add(&scratch->sums[2 * frame + thread_index()], found);
  fence();
}

// The last thread block to come here knows all sums: it writes them to `results` and clears them for the next launch.
__device__ inline void report(std::uint32_t num_frames, std::uint32_t num_blocks, Scratch* scratch,
                              HetkvRemapResult* results) {
  __shared__ std::uint32_t last;
  barrier();  // every thread has added
  if (thread_index() == 0) last = add(&scratch->blocks, 1) + 1 == num_blocks ? 1 : 0;
  barrier();
  if (last == 0) return;
  fence();
  for (std::uint32_t i = thread_index(); i < 2 * num_frames; i += kThreads) {
    volatile std::uint64_t* out = i % 2 == 0 ? &results[i / 2].checksum : &results[i / 2].saturated;
    *out = add(&scratch->sums[i], 0);
    scratch->sums[i] = 0;
  }
  if (thread_index() == 0) scratch->blocks = 0;
}

// Quantise and apply, by all threads of a block.
__device__ inline void run_clusters(const Job& job, std::uint32_t chunk, Partial& partial) {
  with_cluster(job, [&](auto type) {
    typename decltype(type)::type thread(job, chunk * kThreads + thread_index());
    for (std::uint32_t mask = 1; mask < 1u << job.log_cluster; mask *= 2) {
      HETKV_UNROLL
      for (std::uint32_t k = 0; k < kDepth; ++k) {
        const std::uint32_t other = from_lane_across(thread.shared[k], mask);
        if (other > thread.shared[k]) thread.shared[k] = other;
      }
    }
    thread.store(job, partial);
  });
}

template <Paths kPaths>
__device__ inline void run_block(const Job& job, std::uint32_t chunk, Partial& partial) {
  if constexpr (kHasGroups<kPaths>) {
    if (is_clustered(job.path)) return run_clusters(job, chunk, partial);
  }
  run_chunk<kPaths>(job, chunk, thread_index(), partial);
}

// Thread blocks that a multiprocessor has to hold: more wait for memory at once, and have fewer registers each. A fifth
// made moves no faster and conversions spill.
constexpr int blocks_wanted(Paths paths) {
  if (paths == Paths::kGroups) return 3;  // a fourth would spill
  return paths == Paths::kMoves || paths == Paths::kRows ? 4 : 2;
}

// `kTable`: the jobs are in the launch's table, which each block takes them from; otherwise in the launch itself.
template <Paths kPaths, bool kTable>
__global__ void HETKV_LAUNCH_BOUNDS(kThreads, blocks_wanted(kPaths))
    remap_kernel(HETKV_GRID_CONSTANT const Launch launch, std::uint32_t num_blocks, Scratch* scratch,
                 HetkvRemapResult* results) {
  wait_for_launch_before();
  Partial partial;
  std::uint32_t frame = 0;
  const auto begin = [&](std::uint32_t next) {
    if (next == frame) return;
    add_up(partial, frame, scratch);
    partial = Partial{};
    frame = next;
  };
  if constexpr (kTable) {
    constexpr std::uint32_t words = sizeof(Job) / sizeof(std::uint32_t);
    __shared__ std::uint32_t first_chunk[kHetkvMaxJobs];
    alignas(Job) __shared__ std::uint32_t copied[words];
    for (std::uint32_t i = thread_index(); i < launch.num_jobs; i += kThreads) {
      first_chunk[i] = launch.table->first_chunk[i];
    }
    barrier();
    std::uint32_t current = launch.num_jobs;  // none
    for (std::uint32_t next = block_index(); next < launch.num_chunks; next += num_blocks) {
      std::uint32_t chunk = next;
      const std::uint32_t index = job_of(first_chunk, launch.num_jobs, chunk);
      if (index != current) {
        barrier();  // the job before has been run
        const auto* from = reinterpret_cast<const std::uint32_t*>(&launch.table->jobs[index]);
        for (std::uint32_t i = thread_index(); i < words; i += kThreads) copied[i] = from[i];
        barrier();
        current = index;
      }
      const Job& job = *reinterpret_cast<const Job*>(copied);
      begin(job.frame);
      run_block<kPaths>(job, chunk, partial);
    }
  } else {
    for (std::uint32_t next = block_index(); next < launch.num_chunks; next += num_blocks) {
      std::uint32_t chunk = next;
      std::uint32_t index = 0;
      while (index + 1 < launch.num_jobs && chunk >= launch.first_chunk[index + 1]) ++index;
      chunk -= launch.first_chunk[index];
      const Job& job = launch.jobs[index];
      begin(job.frame);
      run_block<kPaths>(job, chunk, partial);
    }
  }
  let_next_launch_start();
  add_up(partial, frame, scratch);
  report(launch.num_frames, num_blocks, scratch, results);
}

}  // namespace hetkv::gpu
