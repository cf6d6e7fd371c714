// What one thread does for one chunk: the same code on a GPU and on the host, where a loop takes the threads in turn.
#pragma once

#include "backend/gpu/cells.h"
#include "backend/gpu/groups.h"
#include "backend/gpu/rows.h"
#include "backend/gpu/scaled.h"
#include "backend/gpu/words.h"

namespace hetkv::gpu {

// Which paths a kernel has: less is faster to start and leaves more registers to the rest.
enum class Paths : std::uint8_t {
  kMoves,   // move16, move8
  kTurns,   // and cells of 1 or 2 bytes an element that convert nothing
  kRows,    // the moves, and convert of tiled tokens
  kGroups,  // the moves, quantise and apply
  kAll,
};

template <Paths kPaths>
constexpr bool kHasGroups = kPaths == Paths::kGroups || kPaths == Paths::kAll;

HETKV_INLINE bool is_clustered(Path path) {
  return path == Path::kQuantise || path == Path::kApply;
}

// The job that a chunk of the launch belongs to; `chunk` then counts from that job's first.
HETKV_INLINE std::uint32_t job_of(const std::uint32_t* first_chunk, std::uint32_t num_jobs, std::uint32_t& chunk) {
  std::uint32_t low = 0;
  for (std::uint32_t high = num_jobs; high - low > 1;) {
    const std::uint32_t middle = (low + high) / 2;
    (chunk < first_chunk[middle] ? high : low) = middle;
  }
  chunk -= first_chunk[low];
  return low;
}

HETKV_INLINE void run_words(const Job& job, std::uint32_t chunk, std::uint32_t thread, Partial& partial) {
  for (std::uint32_t k = 0; k < kDepth; ++k) {
    move_word(job, job.seed, (static_cast<std::uint64_t>(chunk) * kDepth + k) * kThreads + thread, partial);
  }
}

// `chunk` counts from the job's first. Not for paths of clusters, whose threads wait for each other.
template <Paths kPaths>
HETKV_INLINE void run_chunk(const Job& job, std::uint32_t chunk, std::uint32_t thread, Partial& partial) {
  const std::uint64_t seed = job.seed;
  const std::uint32_t item = chunk * kThreads + thread;
  if constexpr (kPaths == Paths::kAll) {
    if (job.path == Path::kWords) return run_words(job, chunk, thread, partial);
  }
  if (item >= job.items) return;
  if constexpr (kPaths == Paths::kAll) {
    if (job.path == Path::kScaled) {
      const Partial found = convert_units(job, item);
      partial.checksum += found.checksum;
      partial.saturated += found.saturated;
      return;
    }
  }
  if (job.path == Path::kMove16) return move_item<4>(job, seed, item, partial);
  if (job.path == Path::kMove8) return move_item<2>(job, seed, item, partial);
  if constexpr (kPaths == Paths::kRows) return convert_tiled(job, seed, item, partial);
  if constexpr (kPaths == Paths::kAll) {
    if (job.path == Path::kConvert) return convert_item(job, seed, item, partial);
  }
  if constexpr (kPaths == Paths::kTurns || kPaths == Paths::kAll) {
    turn_cell<kPaths == Paths::kAll>(job, seed, item, partial);
  }
}

// The smallest set of paths that the jobs need.
inline Paths paths_of(const Job* jobs, std::size_t num_jobs) {
  bool cells = false, converts = false, groups = false;
  for (std::size_t i = 0; i < num_jobs; ++i) {
    const Job& job = jobs[i];
    const bool turns = job.path == Path::kCells;
    const bool converts_scattered = job.path == Path::kConvert && !(job.src.tiled && job.dst.tiled);
    if (job.path == Path::kWords || job.path == Path::kScaled || converts_scattered ||
        (turns && (job.converts || item_size(job.src.dtype) == 4)))
      return Paths::kAll;
    cells |= turns;
    converts |= job.path == Path::kConvert;
    groups |= is_clustered(job.path);
  }
  if (groups) return cells || converts ? Paths::kAll : Paths::kGroups;
  if (cells) return converts ? Paths::kAll : Paths::kTurns;
  return converts ? Paths::kRows : Paths::kMoves;
}

}  // namespace hetkv::gpu
