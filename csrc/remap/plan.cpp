#include "remap/plan.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace hetkv::remap {
namespace {

// Calls body(dst, src) for every position of the outer axes.
template <typename Body>
void for_each(const Axis* outer, int count, Bytes* dst, const Bytes* src, const Body& body) {
  if (count == 0) {
    body(dst, src);
    return;
  }
  for (std::int64_t i = 0; i < outer->count; ++i) {
    for_each(outer + 1, count - 1, dst + i * outer->dst, src + i * outer->src, body);
  }
}

template <int kSize>
void copy_elements(Bytes* dst, const Bytes* src, const Axis& a, const Axis& b) {
  for (std::int64_t j = 0; j < b.count; ++j) {
    Bytes* out = dst + j * b.dst;
    const Bytes* in = src + j * b.src;
    for (std::int64_t i = 0; i < a.count; ++i) std::memcpy(out + i * a.dst, in + i * a.src, kSize);
  }
}

// At most kMaxAxes of them; std::sort's code for long ranges makes GCC 12 warn of bounds that are never reached.
void sort_outermost_first(Axis* axes, int count) {
  const auto outer = [](const Axis& x, const Axis& y) { return x.dst != y.dst ? x.dst > y.dst : x.src > y.src; };
  for (int i = 1; i < count; ++i) {
    for (int j = i; j > 0 && outer(axes[j], axes[j - 1]); --j) std::swap(axes[j], axes[j - 1]);
  }
}

void remove(Axis* axes, int& count, int at) {
  for (int i = at; i + 1 < count; ++i) axes[i] = axes[i + 1];
  --count;
}

}  // namespace

int merge_axes(Axis* axes, int count) {
  int kept = 0;
  for (int i = 0; i < count; ++i) {
    if (axes[i].count != 1) axes[kept++] = axes[i];
  }
  sort_outermost_first(axes, kept);
  for (int i = kept - 1; i > 0; --i) {
    Axis& outer = axes[i - 1];
    const Axis inner = axes[i];
    if (outer.src == inner.src * inner.count && outer.dst == inner.dst * inner.count) {
      outer = Axis{outer.count * inner.count, inner.src, inner.dst};
      remove(axes, kept, i);
    }
  }
  return kept;
}

MovePlan::MovePlan(const Axis* axes, int count, int size) {
  Axis left[kMaxAxes];
  std::copy(axes, axes + count, left);
  count = merge_axes(left, count);
  std::int64_t unit = size;
  if (count > 0 && left[count - 1].src == size && left[count - 1].dst == size) unit *= left[--count].count;
  run_ = unit;

  // Units no wider than a vector register are transposed where each side is contiguous along an axis of its own.
  const bool small = unit == 1 || unit == 2 || unit == 4 || unit == 8 || unit == 16;
  int in = -1;
  for (int i = 0; i + 1 < count; ++i) {
    if (left[i].src == unit) in = i;
  }
  if (small && in >= 0 && left[count - 1].dst == unit) {
    kind_ = Kind::kTranspose;
    while ((std::int64_t{1} << log_size_) < unit) ++log_size_;
    a_ = left[--count];
    b_ = left[in];
    remove(left, count, in);
  } else if (unit == size && size <= 4) {
    kind_ = Kind::kElements;
    if (count > 0) a_ = left[--count];
    if (count > 0) b_ = left[--count];
  } else {
    kind_ = Kind::kRows;
    if (count > 0) a_ = left[--count];
  }
  std::copy(left, left + count, outer_);
  num_outer_ = count;
}

std::uint64_t MovePlan::run(const Kernels& kernels, const Move& move, const WireSum* sum) const {
  std::uint64_t total = 0;
  for_each(outer_, num_outer_, move.dst, move.src, [&](Bytes* out, const Bytes* in) {
    Rows rows{out, in, a_.count, a_.dst, a_.src, move.dst_ahead, move.src_ahead};
    if (kind_ == Kind::kTranspose) {
      rows.dst_step = b_.dst;
      kernels.transpose[log_size_](rows, b_.count);
    } else if (kind_ == Kind::kElements) {
      if (run_ == 1) copy_elements<1>(out, in, a_, b_);
      if (run_ == 2) copy_elements<2>(out, in, a_, b_);
      if (run_ == 4) copy_elements<4>(out, in, a_, b_);
    } else if (sum == nullptr) {
      kernels.copy_rows(rows, run_);
    } else {
      const Bytes* wire = sum->source ? in : out;
      const std::uint64_t index = sum->first + static_cast<std::uint64_t>(wire - sum->origin) / 8;
      const std::uint64_t step = static_cast<std::uint64_t>(sum->source ? a_.src : a_.dst) / 8;
      total += kernels.copy_rows_sum(rows, run_, index, step, sum->seed);
    }
  });
  return total;
}

ConvertPlan::ConvertPlan(const Axis* axes, int count, DType from, DType to)
    : from_(static_cast<int>(from) - 1), to_(static_cast<int>(to) - 1) {
  count = std::min(count, kMaxAxes);
  std::copy(axes, axes + count, outer_);
  count = merge_axes(outer_, count);
  if (count > 0 && outer_[count - 1].src == item_size(from) && outer_[count - 1].dst == item_size(to)) {
    count_ = outer_[--count].count;
  }
  if (count > 0) a_ = outer_[--count];
  num_outer_ = count;
}

std::uint64_t ConvertPlan::run(const Kernels& kernels, const Move& move, float multiplier) const {
  std::uint64_t saturated = 0;
  const auto convert = kernels.convert_rows[from_][to_];
  for_each(outer_, num_outer_, move.dst, move.src, [&](Bytes* out, const Bytes* in) {
    saturated += convert({out, in, a_.count, a_.dst, a_.src, move.dst_ahead, move.src_ahead}, count_, &multiplier, 0);
  });
  return saturated;
}

}  // namespace hetkv::remap
