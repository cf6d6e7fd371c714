// What one thread does for one chunk, and in how many steps: the same code on a GPU, where a barrier separates the
// steps, and on the host, where one loop over all threads follows the other.
#pragma once

#include "backend/gpu/rows.h"
#include "backend/gpu/tile.h"
#include "backend/gpu/words.h"

namespace hetkv::gpu {

// Which paths a kernel has: less is faster to start and leaves more registers to the rest.
enum class Paths : std::uint8_t {
  kMoves,  // move16, move8
  kTurns,  // and tiles that convert nothing
  kRows,   // the moves, and convert
  kAll,
};

HETKV_INLINE const Job& job_of(const Launch& launch, std::uint32_t& chunk) {
  std::uint32_t i = 0;
  while (i + 1 < launch.num_jobs && chunk >= launch.jobs[i + 1].first_chunk) ++i;
  chunk -= launch.jobs[i].first_chunk;
  return launch.jobs[i];
}

HETKV_INLINE bool has_second_step(const Job& job) {
  return job.path == Path::kTile;
}

HETKV_INLINE void run_words(const Job& job, std::uint64_t seed, std::uint32_t chunk, std::uint32_t thread,
                            Partial& partial) {
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    move_word(job, seed, (static_cast<std::uint64_t>(chunk) * kDepth + k) * kThreads + thread, partial);
  }
}

// `chunk` counts from the job's first.
template <Paths kPaths>
HETKV_INLINE void first_step(const Job& job, std::uint64_t seed, std::uint32_t chunk, std::uint32_t thread,
                             std::uint8_t* shared, Partial& partial) {
  const std::uint32_t item = chunk * kThreads + thread;
  if (job.path == Path::kMove16) {
    if (item < job.items) move_rows<4>(job, seed, item, partial);
    return;
  }
  if (job.path == Path::kMove8) {
    if (item < job.items) move_rows<2>(job, seed, item, partial);
    return;
  }
  if constexpr (kPaths == Paths::kRows || kPaths == Paths::kAll) {
    if (job.path == Path::kConvert) {
      if (item < job.items) convert_item(job, seed, item, partial);
      return;
    }
  }
  if constexpr (kPaths == Paths::kTurns || kPaths == Paths::kAll) {
    if (job.path == Path::kTile && !job.converts) {
      with_size(item_size(job.src.dtype), [&](auto size) {
        constexpr int bytes = decltype(size)::value;
        fill_tile<bytes, bytes, false>(job, seed, chunk, thread, shared, partial);
      });
      return;
    }
  }
  if constexpr (kPaths == Paths::kAll) {
    if (job.path == Path::kWords) return run_words(job, seed, chunk, thread, partial);
    with_size(item_size(job.src.dtype), [&](auto from) {
      with_size(item_size(job.dst.dtype), [&](auto to) {
        fill_tile<decltype(from)::value, decltype(to)::value, true>(job, seed, chunk, thread, shared, partial);
      });
    });
  }
}

HETKV_INLINE void second_step(const Job& job, std::uint64_t seed, std::uint32_t chunk, std::uint32_t thread,
                              std::uint8_t* shared, Partial& partial) {
  with_size(item_size(job.dst.dtype),
            [&](auto to) { drain_tile<decltype(to)::value>(job, seed, chunk, thread, shared, partial); });
}

// The smallest set of paths that the launch needs.
inline Paths paths_of(const Launch& launch) {
  bool tiles = false, converts = false;
  for (std::uint32_t i = 0; i < launch.num_jobs; ++i) {
    const Job& job = launch.jobs[i];
    if (job.path == Path::kWords || (job.path == Path::kTile && job.converts)) return Paths::kAll;
    tiles |= job.path == Path::kTile;
    converts |= job.path == Path::kConvert;
  }
  if (tiles) return converts ? Paths::kAll : Paths::kTurns;
  return converts ? Paths::kRows : Paths::kMoves;
}

}  // namespace hetkv::gpu
