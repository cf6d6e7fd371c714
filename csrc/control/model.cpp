#include "control/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <utility>

namespace hetkv::control {
namespace {

constexpr std::size_t kMaxText = 512, kMaxName = 64, kMaxFingerprints = 32, kMaxWorkerAddress = 64 * 1024;

constexpr std::array<std::pair<const char*, DType>, 9> kDTypes = {{
    {"float32", DType::kFloat32},
    {"float16", DType::kFloat16},
    {"bfloat16", DType::kBFloat16},
    {"float8_e4m3fn", DType::kFloat8E4M3FN},
    {"float8_e4m3fnuz", DType::kFloat8E4M3FNUZ},
    {"float8_e5m2", DType::kFloat8E5M2},
    {"float8_e5m2fnuz", DType::kFloat8E5M2FNUZ},
    {"int8", DType::kInt8},
    {"uint8", DType::kUInt8},
}};

Status malformed(std::string text) {
  return Status::error(Code::kMalformed, std::move(text));
}

bool is_text(const std::string& text, std::size_t most) {
  return !text.empty() && text.size() <= 4 * most;
}

Interval head_interval(std::int64_t heads, std::int64_t tp, std::int64_t rank) {
  const std::int64_t start = rank * heads / tp;
  return {start, std::max((rank + 1) * heads / tp, start + 1)};
}

Status check_spec(const Spec& spec) {
  for (std::size_t at = 0; at < spec.layers.size(); ++at) {
    const LayerSpec& layer = spec.layers[at];
    const std::string where = "spec.layers[" + std::to_string(at) + "]";
    if (layer.kind != "kv" && layer.kind != "latent" && layer.kind != "state") return malformed(where + ".kind");
    if (layer.segments.empty()) return malformed(where + ".segments");
    std::set<std::string> names;
    for (const Segment& segment : layer.segments) {
      if (segment.heads < 1 || segment.channels < 1 || !names.insert(segment.name).second) {
        return malformed(where + ".segments: " + segment.name);
      }
      if (segment.heads != layer.segments[0].heads) {
        return malformed(where + ": one head interval must serve all segments");
      }
    }
    if (layer.sliding_window && *layer.sliding_window < 1) return malformed(where + ".sliding_window");
    if (layer.group < 0 || layer.group > 0xffff) return malformed(where + ".group");
    if (layer.shares && (*layer.shares < 0 || *layer.shares >= static_cast<std::int64_t>(spec.layers.size()) ||
                         *layer.shares == static_cast<std::int64_t>(at))) {
      return malformed(where + ".shares");
    }
  }
  return {};
}

Status check_segment(const SegmentLayout& part, const std::string& where) {
  const std::int64_t size = item_size(part.dtype);
  for (const std::int64_t stride :
       {part.offset, part.block_stride, part.token_stride, part.head_stride, part.inner_stride, part.outer_stride}) {
    if (stride < 0 || stride % size != 0) return malformed(where + ": strides are multiples of the element");
  }
  if (part.pack < 1 || part.channels % part.pack != 0) return malformed(where + ".pack");
  if (!part.scale) return {};
  const auto& values = part.scale->values;
  if (values.size() > 1 && static_cast<std::int64_t>(values.size()) != part.heads) return malformed(where + ".scale");
  for (const double value : values) {
    if (!(value > 0) || std::isinf(value)) return malformed(where + ".scale");
  }
  return {};
}

}  // namespace

Interval intersect(const Interval& a, const Interval& b) {
  const std::int64_t start = std::max(a.start, b.start);
  return {start, std::max(start, std::min(a.stop, b.stop))};
}

std::int64_t Spec::groups() const {
  std::int64_t last = -1;
  for (const LayerSpec& layer : layers) last = std::max(last, layer.group);
  return last + 1;
}

Shard Shard::of(const Spec& spec, std::int64_t tp, std::int64_t tp_rank, std::int64_t pp, std::int64_t pp_rank) {
  const auto count = static_cast<std::int64_t>(spec.layers.size());
  Shard shard{{pp_rank * count / pp, (pp_rank + 1) * count / pp}, {}};
  for (const LayerSpec& layer : spec.layers) {
    shard.heads.push_back(head_interval(layer.segments[0].heads, tp, tp_rank));
  }
  return shard;
}

const char* name_of(Role role) {
  return role == Role::kSender ? "sender" : "receiver";
}

const char* name_of(DType dtype) {
  return kDTypes[static_cast<std::size_t>(dtype) - 1].first;
}

std::optional<DType> dtype_of(const std::string& name) {
  for (const auto& [known, dtype] : kDTypes) {
    if (name == known) return dtype;
  }
  return std::nullopt;
}

std::vector<Shard> Description::shards() const {
  return instance_shards.empty() ? std::vector<Shard>{shard} : instance_shards;
}

const Layout* Description::layout(std::int64_t layer) const {
  for (const LayerGroup& group : layers) {
    if (std::find(group.layers.begin(), group.layers.end(), layer) != group.layers.end()) return &group.layout;
  }
  return nullptr;
}

Status check_shard(const Spec& spec, const Shard& shard, const std::string& name) {
  const auto count = static_cast<std::int64_t>(spec.layers.size());
  if (shard.layers.start < 0 || shard.layers.stop < shard.layers.start || shard.layers.stop > count) {
    return malformed(name + ".layers");
  }
  if (shard.heads.size() != spec.layers.size()) return malformed(name + ".heads");
  for (std::size_t at = 0; at < shard.heads.size(); ++at) {
    const Interval& heads = shard.heads[at];
    if (heads.start < 0 || heads.size() < 1 || heads.stop > spec.layers[at].segments[0].heads) {
      return malformed(name + ".heads[" + std::to_string(at) + "]");
    }
  }
  return {};
}

Status Description::check() const {
  if (!is_text(instance, kMaxText)) return malformed("instance");
  if (!is_text(host, kMaxText)) return malformed("host");
  if (!is_text(device, kMaxText)) return malformed("device");
  if (engine.size() > 16) return malformed("engine");
  if (worker_address.size() > kMaxWorkerAddress) return malformed("worker_address");
  if (fingerprint.size() > kMaxFingerprints) return malformed("fingerprint");
  for (const auto& [name, value] : fingerprint) {
    if (!is_text(name, kMaxName) || !is_text(value, kMaxText)) return malformed("fingerprint." + name);
  }
  if (heartbeat_interval_ms < 1 || heartbeat_timeout_ms < 1 || lease_ms < 1) return malformed("heartbeat_ms, lease_ms");
  if (pid < 0 || slot_bytes < 0 || rank < 0) return malformed("pid, slot_bytes, rank");
  Status status = check_spec(spec);
  if (!status.ok()) return status;
  const std::vector<Shard> all = shards();
  if (rank >= static_cast<std::int64_t>(all.size()) || !(all[static_cast<std::size_t>(rank)] == shard)) {
    return malformed("shard is not that of its rank in instance_shards");
  }
  for (const Shard& one : all) {
    status = check_shard(spec, one, "shard");
    if (!status.ok()) return status;
  }
  std::vector<std::int64_t> given;
  for (const LayerGroup& group : layers) given.insert(given.end(), group.layers.begin(), group.layers.end());
  std::sort(given.begin(), given.end());
  std::vector<std::int64_t> owned;
  for (std::int64_t layer = shard.layers.start; layer < shard.layers.stop; ++layer) {
    if (!spec.layers[static_cast<std::size_t>(layer)].shares) owned.push_back(layer);
  }
  if (given != owned) return malformed("layers are not those of the shard");
  for (const LayerGroup& group : layers) {
    if (group.blocks < 1 || group.layout.block_size < 1) return malformed("layers: no blocks");
    for (const std::int64_t layer : group.layers) {
      const LayerSpec& model = spec.layers[static_cast<std::size_t>(layer)];
      const std::string where = "layers[" + std::to_string(layer) + "]";
      if (group.layout.segments.size() != model.segments.size()) return malformed(where + ".layout.segments");
      for (const Segment& segment : model.segments) {
        const auto at = group.layout.segments.find(segment.name);
        if (at == group.layout.segments.end()) return malformed(where + ": no segment " + segment.name);
        const std::int64_t held = shard.heads[static_cast<std::size_t>(layer)].size();
        if (at->second.heads != held || at->second.channels != segment.channels) {
          return malformed(where + "." + segment.name + ": other heads or channels than the shard's");
        }
        status = check_segment(at->second, where + "." + segment.name);
        if (!status.ok()) return status;
      }
    }
  }
  return {};
}

}  // namespace hetkv::control
