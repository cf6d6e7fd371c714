#include "remap/remap.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <optional>
#include <utility>

#include "remap/isa.h"
#include "remap/job.h"
#include "remap/scaled.h"
#include "remap/threads.h"

namespace hetkv::remap {
namespace {

constexpr std::size_t kMaxGroup = 4;
constexpr std::int64_t kBytesPerThread = 128 * 1024;

std::int64_t bytes_of(const Job& job) {
  return job.tokens * job.heads * job.channels * std::max(item_size(job.src.map.dtype), item_size(job.dst.map.dtype));
}

// Rounding to nearest and subnormals kept, regardless of what the caller's thread has set.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { std::fesetenv(&saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  std::fenv_t saved_;
};

// Both sides keep the same tokens in the same blocks: packed or interleaved K and V.
bool shares_blocks(const Side& a, const Side& b) {
  if (a.map.block_size == 0 || a.map.block_size != b.map.block_size || a.first_token != b.first_token) return false;
  const std::uint64_t distance = a.map.base > b.map.base ? a.map.base - b.map.base : b.map.base - a.map.base;
  return a.map.block_stride == b.map.block_stride && distance < static_cast<std::uint64_t>(a.map.block_stride);
}

// Runners of jobs that follow one another on one thread: the one that was made to fetch what the next job moves first
// runs that job, too.
struct Chain {
  std::optional<JobRunner> runners[2];
  int now = 0;
  const Job* ready = nullptr;  // the job that runners[now] has been started on
};

// The work of all jobs on one scale of bytes, so that each thread takes one contiguous part of it.
class Work {
 public:
  Work(const Job* jobs, std::size_t num_jobs, std::uint64_t seed, int threads)
      : jobs_(jobs), num_jobs_(num_jobs), seed_(seed), kernels_(kernels()) {
    for (std::size_t i = 0; i < num_jobs; ++i) bytes_ += bytes_of(jobs[i]);
    parts_ = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(1, bytes_ / kBytesPerThread));
  }

  // All of it on this thread, which holds a DefaultRounding. `next`: the job that this thread runs then; null: none.
  Result run_here(const Job* next, std::uint64_t next_seed, Chain& chain) noexcept {
    Result result;
    for (std::size_t i = 0; i < num_jobs_;) {
      const std::size_t count = group(i);
      if (count > 1 || jobs_[i].scaled()) {
        std::int64_t size = 0;
        for (std::size_t j = i; j < i + count; ++j) size += bytes_of(jobs_[j]);
        if (size > 0) run_group(i, count, size, 0, size, result);
      } else {
        const bool last = i + 1 == num_jobs_;
        run_alone(jobs_[i], last ? next : &jobs_[i + 1], last ? next_seed : seed_, chain, result);
      }
      i += count;
    }
    for (std::size_t i = 0; i < num_jobs_; ++i) result.checksum += sum_whole(jobs_[i]);
    return result;
  }

  Result run() noexcept {
    if (parts_ == 1) {
      run_part(0);
    } else {
      const auto body = [](void* work, int part) noexcept { static_cast<Work*>(work)->run_part(part); };
      parallel(static_cast<int>(parts_), body, this);
    }
    Result result{checksum_, saturated_};
    for (std::size_t i = 0; i < num_jobs_; ++i) result.checksum += sum_whole(jobs_[i]);
    return result;
  }

 private:
  void run_part(std::int64_t part) noexcept {
    const DefaultRounding rounding;
    const std::int64_t from = bytes_ / parts_ * part;
    const std::int64_t to = part + 1 == parts_ ? bytes_ : bytes_ / parts_ * (part + 1);
    Result result;
    std::int64_t first = 0;
    for (std::size_t i = 0; i < num_jobs_;) {
      const std::size_t count = group(i);
      std::int64_t size = 0;
      for (std::size_t j = i; j < i + count; ++j) size += bytes_of(jobs_[j]);
      if (size > 0 && first < to && first + size > from) run_group(i, count, size, from - first, to - first, result);
      first += size;
      i += count;
    }
    checksum_.fetch_add(result.checksum, std::memory_order_relaxed);
    saturated_.fetch_add(result.saturated, std::memory_order_relaxed);
  }

  void run_alone(const Job& job, const Job* next, std::uint64_t next_seed, Chain& chain, Result& result) const {
    if (std::exchange(chain.ready, nullptr) != &job) start(chain.runners[chain.now], job, seed_);
    JobRunner& runner = *chain.runners[chain.now];
    if (next == nullptr || next->scaled()) {
      while (runner.pending()) runner.step(result);
      return;
    }
    chain.now = 1 - chain.now;
    chain.ready = next;
    const JobRunner& following = start(chain.runners[chain.now], *next, next_seed);
    while (runner.pending()) runner.step(result, &following);
  }

  JobRunner& start(std::optional<JobRunner>& at, const Job& job, std::uint64_t seed) const {
    at.emplace(job, kernels_, seed).start(0, job.tokens, 0, job.heads);
    return *at;
  }

  // Jobs from `first` on that take turns, so that a pool's block is read or written once.
  std::size_t group(std::size_t first) const {
    std::size_t count = 1;
    while (count < kMaxGroup && first + count < num_jobs_) {
      const Job& a = jobs_[first];
      const Job& b = jobs_[first + count];
      if (a.tokens != b.tokens || a.heads != b.heads || a.scaled() || b.scaled()) break;
      if (!shares_blocks(a.src, b.src) && !shares_blocks(a.dst, b.dst)) break;
      ++count;
    }
    return count;
  }

  // Bytes [from, to) of the group, cut at tokens, or at heads where there are too few tokens.
  void run_group(std::size_t first, std::size_t count, std::int64_t size, std::int64_t from, std::int64_t to,
                 Result& result) const {
    const std::int64_t tokens = jobs_[first].tokens;
    const std::int64_t heads = jobs_[first].heads;
    const bool by_head = tokens < 64 * parts_ && heads >= parts_ && !jobs_[first].joint;
    const std::int64_t whole = by_head ? heads : tokens;
    const std::int64_t grain = by_head ? 1 : std::clamp<std::int64_t>(tokens / (4 * parts_), 1, 64);
    const std::int64_t start = cut(from, size, whole, grain);
    const std::int64_t stop = cut(to, size, whole, grain);
    if (jobs_[first].scaled()) {
      const ScaledRunner runner(jobs_[first], kernels_, seed_);
      if (by_head) runner.run(0, tokens, start, stop, result);
      if (!by_head) runner.run(start, stop, 0, heads, result);
      return;
    }
    std::optional<JobRunner> runners[kMaxGroup];
    for (std::size_t i = 0; i < count; ++i) {
      runners[i].emplace(jobs_[first + i], kernels_, seed_);
      if (by_head) runners[i]->start(0, tokens, start, stop);
      if (!by_head) runners[i]->start(start, stop, 0, heads);
    }
    for (;;) {
      JobRunner* last = nullptr;
      for (std::size_t i = 0; i < count; ++i) {
        if (runners[i]->pending() && (last == nullptr || runners[i]->slower_than(*last))) last = &*runners[i];
      }
      if (last == nullptr) return;
      last->step(result);
    }
  }

  static std::int64_t cut(std::int64_t at, std::int64_t size, std::int64_t whole, std::int64_t grain) {
    if (at <= 0) return 0;
    if (at >= size) return whole;
    const double share = static_cast<double>(at) / static_cast<double>(size);
    return static_cast<std::int64_t>(share * static_cast<double>(whole)) / grain * grain;
  }

  // Payload parts whose tokens are not whole words, and scales, are summed once all of the job has been moved.
  std::uint64_t sum_whole(const Job& job) const {
    if (job.scaled()) return ScaledRunner(job, kernels_, seed_).sum_rest();
    if (job.wire == WireSide::kNone || JobRunner::sums_in_parts(job)) return 0;
    const SegmentMap& wire = job.wire == WireSide::kSource ? job.src.map : job.dst.map;
    const auto* data = reinterpret_cast<const Bytes*>(static_cast<std::uintptr_t>(wire.base));
    const std::int64_t bytes = job.tokens * job.heads * job.channels * item_size(wire.dtype);
    return kernels_.checksum(data, bytes, job.wire_offset / 8, seed_);
  }

  const Job* jobs_;
  std::size_t num_jobs_;
  std::uint64_t seed_;
  const Kernels& kernels_;
  std::int64_t parts_ = 1;
  std::int64_t bytes_ = 0;  // of all jobs
  std::atomic<std::uint64_t> checksum_{0};
  std::atomic<std::uint64_t> saturated_{0};
};

}  // namespace

Result remap_cpu(const Job* jobs, std::size_t num_jobs, std::uint64_t seed, int threads) noexcept {
  return Work(jobs, num_jobs, seed, threads).run();
}

bool reads_twice(const Job& job) {
  return job.wire == WireSide::kSource && (job.scaled() || !JobRunner::reads_once(job));
}

namespace {

// Frames that threads take one at a time.
struct Frames {
  const Job* jobs;
  Frame* frames;
  std::size_t num_frames;
  std::atomic<std::size_t> next{0};

  void run() noexcept {
    const DefaultRounding rounding;
    const Job* first = jobs;
    std::size_t at = 0;
    Chain chain;
    for (std::size_t mine = next++; mine < num_frames; mine = next++) {
      for (; at < mine; ++at) first += frames[at].num_jobs;
      Frame& frame = frames[mine];
      const bool more = mine + 1 < num_frames && frames[mine + 1].num_jobs > 0;
      const Job* following = more ? first + frame.num_jobs : nullptr;
      frame.result =
          Work(first, frame.num_jobs, frame.seed, 1).run_here(following, more ? frames[mine + 1].seed : 0, chain);
    }
  }
};

}  // namespace

void remap_frames_cpu(const Job* jobs, Frame* frames, std::size_t num_frames, int threads) noexcept {
  std::int64_t bytes = 0;
  std::size_t num_jobs = 0;
  for (std::size_t i = 0; i < num_frames; ++i) num_jobs += frames[i].num_jobs;
  for (std::size_t i = 0; i < num_jobs; ++i) bytes += bytes_of(jobs[i]);
  const std::int64_t parts = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(1, bytes / kBytesPerThread));
  if (parts > 1 && num_frames < 4 * static_cast<std::size_t>(parts)) {
    for (std::size_t i = 0; i < num_frames; ++i) {
      frames[i].result = remap_cpu(jobs, frames[i].num_jobs, frames[i].seed, threads);
      jobs += frames[i].num_jobs;
    }
    return;
  }
  Frames all{jobs, frames, num_frames};
  if (parts == 1) return all.run();
  parallel(static_cast<int>(parts), [](void* work, int) noexcept { static_cast<Frames*>(work)->run(); }, &all);
}

}  // namespace hetkv::remap
