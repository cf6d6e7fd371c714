// A launch of the emulated GPU: thread blocks, and a block's threads, one after the other.
#include <algorithm>
#include <vector>

#include "backend/gpu/launch.h"

namespace hetkv::gpu {

// All threads are made, which load; each cluster learns the largest of what it shares; all threads store.
void run_clusters(const Job& job, std::uint32_t chunk, Partial& partial) {
  with_cluster(job, [&](auto type) {
    std::vector<typename decltype(type)::type> threads;
    threads.reserve(kThreads);
    for (std::uint32_t i = 0; i < kThreads; ++i) threads.emplace_back(job, chunk * kThreads + i);
    const std::uint32_t cluster = 1u << job.log_cluster;
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      for (std::uint32_t first = 0; first < kThreads; first += cluster) {
        std::uint32_t most = 0;
        for (std::uint32_t i = first; i < first + cluster; ++i) most = std::max(most, threads[i].shared[k]);
        for (std::uint32_t i = first; i < first + cluster; ++i) threads[i].shared[k] = most;
      }
    }
    for (const auto& thread : threads) thread.store(job, partial);
  });
}

template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, HetkvRemapResult* results,
                 gpuStream_t) {
  std::uint32_t blocks = static_cast<std::uint32_t>(max_blocks > 0 ? max_blocks : 4 * multiprocessors);
  blocks = std::max(1u, std::min(blocks, launch.num_chunks));
  const std::uint32_t* first_chunk = launch.table != nullptr ? launch.table->first_chunk : launch.first_chunk;
  const Job* jobs = launch.table != nullptr ? launch.table->jobs : launch.jobs;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    for (std::uint32_t next = block; next < launch.num_chunks; next += blocks) {
      std::uint32_t chunk = next;
      const Job& job = jobs[job_of(first_chunk, launch.num_jobs, chunk)];
      Partial partial;
      if (kHasGroups<kPaths> && is_clustered(job.path)) {
        run_clusters(job, chunk, partial);
      } else {
        for (std::uint32_t thread = 0; thread < kThreads; ++thread) run_chunk<kPaths>(job, chunk, thread, partial);
      }
      scratch->sums[2 * job.frame] += partial.checksum;
      scratch->sums[2 * job.frame + 1] += partial.saturated;
    }
  }
  for (std::uint32_t i = 0; i < launch.num_frames; ++i) results[i] = {scratch->sums[2 * i], scratch->sums[2 * i + 1]};
  *scratch = Scratch{};
  return gpuSuccess;
}

template <Paths kPaths>
gpuError_t load() {
  return gpuSuccess;
}

template gpuError_t load<Paths::kMoves>();
template gpuError_t load<Paths::kTurns>();
template gpuError_t load<Paths::kRows>();
template gpuError_t load<Paths::kGroups>();
template gpuError_t load<Paths::kAll>();

template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kGroups>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kAll>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
