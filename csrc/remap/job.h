// One job on one thread, piece by piece: a piece crosses no block boundary and fits the caches.
#pragma once

#include "remap/plan.h"
#include "remap/remap.h"

namespace hetkv::remap {

class JobRunner {
 public:
  // The job outlives the runner.
  JobRunner(const Job& job, const Kernels& kernels, std::uint64_t seed);

  // Starts on tokens [token, token_end) of heads [head, head_end), both of the job.
  void start(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end);

  // Something is left to move.
  bool pending() const { return pending_; }

  // The next piece comes before the other's, for jobs that take turns.
  bool slower_than(const JobRunner& other) const {
    const Piece& a = piece_;
    const Piece& b = other.piece_;
    if (a.window != b.window) return a.window < b.window;
    return a.head != b.head ? a.head < b.head : a.token < b.token;
  }

  // Moves one piece and adds to `result`. After the last one, what `following` moves first is fetched.
  void step(Result& result, const JobRunner* following = nullptr);

  // A piece of the payload is summed and moved from one copy of it, or read once: sums_in_parts jobs whose tokens of a
  // head fit into such a copy.
  static bool reads_once(const Job& job);

  // Every token of a head begins at a whole word of the payload, so any part of the job can be summed by itself.
  static bool sums_in_parts(const Job& job) {
    if (job.wire == WireSide::kNone) return false;
    const SegmentMap& wire = job.wire == WireSide::kSource ? job.src.map : job.dst.map;
    return job.channels * item_size(wire.dtype) % 8 == 0;
  }

 private:
  struct Piece {
    std::int64_t window, token, tokens, head, heads;
    Bytes* dst;
    const Bytes* src;
  };

  void open_window();
  bool next(Piece& piece);
  void plan(const Piece& piece);
  void run(const Piece& piece, const Piece* after, Result& result);
  std::uint64_t sum(const Piece& piece) const;
  std::uint64_t convert(const Piece& piece, const Move& move) const;
  std::uint64_t convert_tiles(const Move& move, std::int64_t tokens, float multiplier) const;
  std::uint64_t convert_tile(const Move& move, std::int64_t tokens, std::int64_t outer, std::int64_t inner,
                             float multiplier) const;

  const Job& job_;
  const Kernels& kernels_;
  const std::int64_t from_size_, to_size_;
  const bool converts_, sums_;
  std::int64_t span_ = 1;   // channels within which both sides are affine in (outer, inner)
  std::int64_t inner_ = 1;  // channels of one inner run
  WireSum sum_;
  bool snapshots_ = false;       // pieces are moved and summed from a copy of their payload
  std::int64_t src_head_ = 0;    // bytes from head to head where they are moved from
  std::int64_t wire_token_ = 0;  // bytes of one token of one head in the payload

  // Where the pieces are cut. A window of tokens is moved for some heads, then for the next: the larger of the two
  // sides' blocks where tokens are close together, so that its lines are finished while they are in the caches.
  std::int64_t token_ = 0, token_end_ = 0, first_head_ = 0, head_ = 0, head_end_ = 0;
  std::int64_t window_ = 0, window_end_ = 0;
  std::int64_t stretch_ = 0;  // tokens from token_ on that are affine on both sides
  std::int64_t piece_tokens_ = 0, piece_heads_ = 0;
  bool pending_ = false;
  Piece piece_{};

  std::int64_t plan_tokens_ = -1, plan_heads_ = -1;  // what the plans below are for
  MovePlan move_;
  ConvertPlan runs_;
  bool direct_ = false;  // runs_ are long enough; otherwise conversions go through a tile
  Axis token_axis_, outer_axis_, inner_axis_;
};

}  // namespace hetkv::remap
