// A launch of the emulated GPU: thread blocks, and a block's threads, one after the other.
#include <algorithm>

#include "backend/gpu/launch.h"

namespace hetkv::gpu {

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
      for (std::uint32_t thread = 0; thread < kThreads; ++thread) run_chunk<kPaths>(job, chunk, thread, partial);
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
template gpuError_t load<Paths::kAll>();

template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kAll>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
