// One job with scales on one thread, row by row: a row is the channels of one token and head that share all scales.
#pragma once

#include "remap/plan.h"
#include "remap/remap.h"

namespace hetkv::remap {

constexpr std::int64_t kScaledTokens = 64;      // of one step, so that a step's rows stay in the first caches
constexpr std::int64_t kScaledElements = 2048;  // of a tile, for a side whose channels are not contiguous

class ScaledRunner {
 public:
  // The job outlives the runner.
  ScaledRunner(const Job& job, const Kernels& kernels, std::uint64_t seed);

  // Tokens [token, token_end) of heads [head, head_end); a joint job is given all its heads. Adds to `result`.
  void run(std::int64_t token, std::int64_t token_end, std::int64_t head, std::int64_t head_end, Result& result) const;

  // Every token of a head begins at a whole word of the payload, so `run` sums the codes as it goes.
  bool sums_in_parts() const { return job_.wire != WireSide::kNone && wire_token_ % 8 == 0; }

  // Checksum of what `run` leaves out, once the whole job has run: the scales on the wire, and codes in odd rows.
  std::uint64_t sum_rest() const;

 private:
  // One step: tokens [token, token + tokens), which are in one block on either side, of one head.
  struct Step {
    std::int64_t token, tokens, head;
  };

  void scale(const Step& step, std::int64_t heads, Result& result) const;
  void apply(const Step& step, Result& result) const;
  void multipliers(const Step& step, std::int64_t channel, float* out) const;
  void amax(const Step& step, std::int64_t channel, float* out) const;
  std::uint64_t convert(const Step& step, std::int64_t channel, const float* factors) const;
  Rows rows(const Step& step, std::int64_t channel) const;
  Rows gather(const Rows& whole, Bytes* tile) const;

  const Job& job_;
  const Kernels& kernels_;
  const std::uint64_t seed_;
  const std::int64_t from_size_, to_size_;
  const int from_, to_;     // indices of the kernels' tables
  std::int64_t unit_ = 1;   // channels of a row
  std::int64_t group_ = 1;  // channels that share a scale of the destination; all where it has none
  std::int64_t step_tokens_ = 1;
  bool src_dense_ = false, dst_dense_ = false;
  std::int64_t wire_token_ = 0;  // bytes of one token of one head in the payload
};

}  // namespace hetkv::remap
