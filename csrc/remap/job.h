// One job on one thread, piece by piece: a piece crosses no block boundary and fits the caches.
#pragma once

#include "remap/plan.h"
#include "remap/remap.h"

namespace hetkv {

class JobRunner {
 public:
  // The job outlives the runner.
  JobRunner(const RemapJob& job, const Kernels& kernels, std::uint64_t seed);

  // Starts on tokens [token, token_end) of heads [head, head_end), both of the job.
  void start(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end);

  // Something is left to move.
  bool pending() const { return pending_; }

  // Where the next piece begins, for jobs that take turns: tokens first, then heads.
  bool behind(const JobRunner& other) const {
    return piece_.token != other.piece_.token ? piece_.token < other.piece_.token : piece_.head < other.piece_.head;
  }

  // Moves one piece and adds to `result`.
  void step(RemapResult& result);

  // Every token of a head begins at a whole word of the payload, so any part of the job can be summed by itself.
  bool sums_in_parts() const { return job_.wire != WireSide::kNone && wire_token_ % 8 == 0; }

 private:
  struct Piece {
    std::int64_t token, tokens, head, heads;
    Bytes* dst;
    const Bytes* src;
  };

  bool next(Piece& piece);
  void plan(const Piece& piece);
  void run(const Piece& piece, const Piece* after, RemapResult& result);
  std::uint64_t sum(const Piece& piece) const;
  std::uint64_t convert(const Piece& piece, const Move& move) const;
  std::uint64_t convert_tiles(const Move& move, std::int64_t tokens, float multiplier) const;
  std::uint64_t convert_tile(const Move& move, std::int64_t tokens, std::int64_t outer, std::int64_t inner,
                             float multiplier) const;

  const RemapJob& job_;
  const Kernels& kernels_;
  const std::int64_t from_size_, to_size_;
  const bool converts_;
  std::int64_t span_ = 1;   // channels within which both sides are affine in (outer, inner)
  std::int64_t inner_ = 1;  // channels of one inner run
  WireSum sum_;
  std::int64_t wire_token_ = 0;  // bytes of one token of one head in the payload

  // Where the pieces are cut: `stretch_` tokens from token_ on are affine on both sides.
  std::int64_t token_ = 0, token_end_ = 0, first_head_ = 0, head_ = 0, head_end_ = 0;
  std::int64_t stretch_ = 0, piece_tokens_ = 0, piece_heads_ = 0;
  bool pending_ = false;
  Piece piece_{};

  std::int64_t plan_tokens_ = -1, plan_heads_ = -1;  // what the plans below are for
  MovePlan move_;
  ConvertPlan runs_;
  bool direct_ = false;  // runs_ are long enough; otherwise conversions go through a tile
  Axis token_axis_, outer_axis_, inner_axis_;
};

}  // namespace hetkv
