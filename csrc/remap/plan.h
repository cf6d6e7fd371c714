// A strided move of one affine piece (no block boundary inside), analysed once and run at many addresses.
#pragma once

#include <cstdint>

#include "remap/kernels.h"

namespace hetkv::remap {

// One axis of a piece: its length and its step in bytes on both sides.
struct Axis {
  std::int64_t count = 1;
  std::int64_t src = 0;
  std::int64_t dst = 0;
};

constexpr int kMaxAxes = 4;

// Drops axes of length 1, orders the rest by destination step, longest first, and joins each with the next where both
// sides are contiguous. Returns how many are left.
int merge_axes(Axis* axes, int count);

// Where the checksum of a move comes from: the wire side's words, counted from `origin`, which is word `first`.
struct WireSum {
  const Bytes* origin = nullptr;
  std::uint64_t first = 0;
  std::uint64_t seed = 0;
  bool source = false;
};

// Where a move starts on both sides, and how far away the next one does (see Rows).
struct Move {
  Bytes* dst;
  const Bytes* src;
  std::int64_t dst_ahead;
  std::int64_t src_ahead;
};

// Moves elements of one size bit for bit.
class MovePlan {
 public:
  MovePlan() = default;
  // At most kMaxAxes axes; `size` is 1, 2 or 4.
  MovePlan(const Axis* axes, int count, int size);

  // Whole words move in one run, so that `run` can sum them on the way.
  bool can_sum() const { return kind_ == Kind::kRows && run_ % 8 == 0; }

  // With `sum` (only where can_sum()) returns the checksum of the wire side, else 0.
  std::uint64_t run(const Kernels& kernels, const Move& move, const WireSum* sum = nullptr) const;

 private:
  enum class Kind : std::uint8_t { kRows, kTranspose, kElements };

  Kind kind_ = Kind::kRows;
  int log_size_ = 0;      // of what is transposed: an element, or a unit of 2 to 16 bytes
  std::int64_t run_ = 0;  // bytes that are contiguous on both sides
  Axis a_, b_;            // kRows: runs over a_. kTranspose, kElements: a_ has the smaller destination step
  Axis outer_[kMaxAxes];  // around these, outermost first
  int num_outer_ = 0;
};

// Converts runs that are contiguous on both sides.
class ConvertPlan {
 public:
  ConvertPlan() = default;
  ConvertPlan(const Axis* axes, int count, DType from, DType to);

  // Elements of one run; 1 where the sides share no contiguous axis.
  std::int64_t run_length() const { return count_; }

  // Returns how many elements saturated.
  std::uint64_t run(const Kernels& kernels, const Move& move, float multiplier) const;

 private:
  int from_ = 0;
  int to_ = 0;
  std::int64_t count_ = 1;
  Axis a_;
  Axis outer_[kMaxAxes];
  int num_outer_ = 0;
};

}  // namespace hetkv::remap
