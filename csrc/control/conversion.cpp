#include "control/conversion.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace hetkv::control {
namespace {

const double kSmallest = std::ldexp(1.0, -126), kLargest = std::ldexp(1.0, 127);  // normal float32

bool exact(DType dtype) {
  return dtype == DType::kInt8 || dtype == DType::kUInt8;
}

DType ocp(DType dtype) {
  if (dtype == DType::kFloat8E4M3FNUZ) return DType::kFloat8E4M3FN;
  return dtype == DType::kFloat8E5M2FNUZ ? DType::kFloat8E5M2 : dtype;
}

// Scale of the OCP twin's codes for each scale of the fnuz codes.
double twin_scale(DType dtype) {
  return dtype == DType::kFloat8E4M3FNUZ ? 0.5 : 1.0;
}

std::optional<DType> wire_dtype(DType src, DType dst) {
  if (exact(src) || exact(dst)) return src == dst ? std::optional<DType>(src) : std::nullopt;
  return ocp(item_size(src) <= item_size(dst) ? src : dst);
}

std::vector<double> static_scales(const SegmentLayout& part, const Interval& heads, const Interval& held) {
  if (!part.scale) return std::vector<double>(static_cast<std::size_t>(heads.size()), 1.0);
  const auto& values = part.scale->values;
  if (values.size() == 1) return std::vector<double>(static_cast<std::size_t>(heads.size()), values[0]);
  const auto first = values.begin() + (heads.start - held.start);
  return {first, first + heads.size()};
}

std::string text(const std::vector<double>& scales) {
  std::string out = "[";
  for (const double scale : scales) out += (out.size() > 1 ? ", " : "") + std::to_string(scale);
  return out + "]";
}

std::vector<double> scaled(std::vector<double> scales, double factor) {
  for (double& scale : scales) scale *= factor;
  return scales;
}

std::vector<double> ratio(const std::vector<double>& above, const std::vector<double>& below) {
  std::vector<double> out;
  for (std::size_t at = 0; at < above.size(); ++at) out.push_back(above[at] / below[at]);
  const bool ones = std::all_of(out.begin(), out.end(), [](double value) { return value == 1.0; });
  return ones ? std::vector<double>() : out;
}

bool normal(const std::vector<double>& factors) {
  return std::all_of(factors.begin(), factors.end(),
                     [](double factor) { return kSmallest <= factor && factor <= kLargest; });
}

}  // namespace

Conversion segment_conversion(const SegmentLayout& src, const SegmentLayout& dst, const Interval& heads,
                              const Interval& src_heads, const Interval& dst_heads, Incompatible* mismatch) {
  if (src.scales_in_memory() || dst.scales_in_memory()) {
    const auto say = [](const SegmentLayout& part) { return part.scales_in_memory() ? "in memory" : "static or none"; };
    *mismatch = {"scale", say(src), say(dst), "the C library carries static scales only"};
    return {};
  }
  const std::optional<DType> wire = wire_dtype(src.dtype, dst.dtype);
  if (!wire) {
    *mismatch = {"dtype", name_of(src.dtype), name_of(dst.dtype),
                 "opaque bytes, and int8 without scales in memory, are not converted"};
    return {};
  }
  if (*wire == DType::kUInt8) return {*wire, {}, {}};
  const std::vector<double> source = static_scales(src, heads, src_heads),
                            target = static_scales(dst, heads, dst_heads);
  if (*wire == DType::kInt8 && source != target) {
    *mismatch = {"scale", text(source), text(target), "int8 is not requantised to a static scale"};
    return {};
  }
  if (src.dtype == dst.dtype && source == target) return {src.dtype, {}, {}};
  std::vector<double> on_wire;  // the side whose dtype travels moves bits
  if (*wire == src.dtype) {
    on_wire = source;
  } else if (*wire == dst.dtype) {
    on_wire = target;
  } else if (src.dtype != dst.dtype && item_size(src.dtype) <= item_size(dst.dtype)) {
    on_wire = scaled(source, twin_scale(src.dtype));
  } else {
    on_wire = scaled(target, twin_scale(dst.dtype));
  }
  Conversion found{*wire, ratio(source, on_wire), ratio(on_wire, target)};
  if (!normal(found.pack) || !normal(found.unpack)) {
    *mismatch = {"scale", text(source), text(target), "their ratio is not a normal float32"};
  }
  return found;
}

}  // namespace hetkv::control
