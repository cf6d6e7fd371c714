// A launch of the emulated GPU: thread blocks one after the other, each step of a chunk by all threads before the next.
#include <algorithm>
#include <vector>

#include "backend/gpu/launch.h"

namespace hetkv::gpu {

template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, RemapResult* result,
                 gpuStream_t) {
  std::uint32_t blocks = static_cast<std::uint32_t>(max_blocks > 0 ? max_blocks : 4 * multiprocessors);
  blocks = std::max(1u, std::min(blocks, launch.num_chunks));
  // Exactly as much as the launch asks for, so that a sanitizer sees what lies beyond; aligned like a GPU's.
  std::vector<Vector<4>> memory(shared_bytes(launch) / 16);
  std::uint8_t* shared = reinterpret_cast<std::uint8_t*>(memory.data());
  Partial total;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    for (std::uint32_t next = block; next < launch.num_chunks; next += blocks) {
      std::uint32_t chunk = next;
      const Job& job = job_of(launch, chunk);
      Partial partial;
      for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
        first_step<kPaths>(job, launch.seed, chunk, thread, shared, partial);
      }
      if ((kPaths == Paths::kAll || kPaths == Paths::kTurns) && has_second_step(job)) {
        for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
          second_step(job, launch.seed, chunk, thread, shared, partial);
        }
      }
      total.checksum += partial.checksum;
      scratch->saturated += partial.saturated;
    }
  }
  scratch->checksum += total.checksum;
  if (result == nullptr) return gpuSuccess;
  *result = {scratch->checksum, scratch->saturated};
  *scratch = Scratch{};
  return gpuSuccess;
}

template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, RemapResult*, gpuStream_t);
template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, RemapResult*, gpuStream_t);
template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, RemapResult*, gpuStream_t);
template gpuError_t start<Paths::kAll>(const Launch&, int, int, Scratch*, RemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
