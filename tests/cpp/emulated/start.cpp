// A launch of the emulated GPU: thread blocks, and a block's threads, one after the other.
#include <algorithm>

#include "backend/gpu/launch.h"

namespace hetkv::gpu {

template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, HetkvRemapResult* result,
                 gpuStream_t) {
  std::uint32_t blocks = static_cast<std::uint32_t>(max_blocks > 0 ? max_blocks : 4 * multiprocessors);
  blocks = std::max(1u, std::min(blocks, launch.num_chunks));
  Partial total;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    for (std::uint32_t next = block; next < launch.num_chunks; next += blocks) {
      std::uint32_t chunk = next;
      const Job& job = job_of(launch, chunk);
      Partial partial;
      for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
        run_chunk<kPaths>(job, launch.seed, chunk, thread, partial);
      }
      total.checksum += partial.checksum;
      scratch->before[2] += partial.saturated;
    }
  }
  scratch->before[0] += total.checksum;
  if (result == nullptr) return gpuSuccess;
  *result = {scratch->before[0], 0, scratch->before[2]};
  *scratch = Scratch{};
  return gpuSuccess;
}

template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t start<Paths::kAll>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
