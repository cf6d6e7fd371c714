#include "capi/pool.h"

#include <algorithm>
#include <set>

namespace hetkv::capi {
namespace {

using control::Interval;

constexpr std::uint32_t kMostLayers = 1 << 14, kMostSegments = 4;

Result invalid(std::string text) {
  return failure(HETKV_INPUT, std::move(text));
}

Result read_spec(const hetkv_pool_config& config, control::Spec* out) {
  static const char* const kinds[] = {"kv", "latent", "state"};
  if (config.layers == nullptr || config.num_layers < 1 || config.num_layers > kMostLayers) {
    return invalid("num_layers is " + std::to_string(config.num_layers));
  }
  for (std::uint32_t at = 0; at < config.num_layers; ++at) {
    const hetkv_layer& layer = config.layers[at];
    const std::string where = "layers[" + std::to_string(at) + "]";
    if (layer.kind < HETKV_KV || layer.kind > HETKV_STATE) return invalid(where + ".kind");
    if (layer.segments == nullptr || layer.num_segments < 1 || layer.num_segments > kMostSegments) {
      return invalid(where + ".num_segments is " + std::to_string(layer.num_segments));
    }
    control::LayerSpec spec;
    spec.kind = kinds[layer.kind];
    spec.group = layer.group;
    if (layer.sliding_window > 0) spec.sliding_window = layer.sliding_window;
    if (layer.shares > 0) spec.shares = static_cast<std::int64_t>(layer.shares) - 1;
    for (std::uint32_t part = 0; part < layer.num_segments; ++part) {
      const hetkv_segment& segment = layer.segments[part];
      if (segment.name == nullptr) return invalid(where + ": a segment has no name");
      spec.segments.push_back({segment.name, segment.heads, segment.channels});
    }
    out->layers.push_back(std::move(spec));
  }
  return {};
}

// Strides nest where each passes what is inside of it, so that no two elements share bytes.
bool nests(const control::SegmentLayout& part, std::int64_t block_size, std::int64_t blocks) {
  std::vector<std::pair<std::int64_t, std::int64_t>> axes;  // stride, count
  for (const auto& [stride, count] : {std::pair{part.block_stride, blocks},
                                      {part.token_stride, block_size},
                                      {part.head_stride, part.heads},
                                      {part.outer_stride, part.channels / part.pack},
                                      {part.inner_stride, part.pack}}) {
    if (count > 1) axes.emplace_back(stride, count);
  }
  std::sort(axes.begin(), axes.end());
  std::int64_t extent = item_size(part.dtype);
  for (const auto& [stride, count] : axes) {
    if (stride < extent) return false;
    extent = stride * (count - 1) + extent;
  }
  return true;
}

Result read_memory(const hetkv_layer_memory& memory, Pool* pool) {
  const std::string where = "memory of layer " + std::to_string(memory.layer);
  if (memory.layer >= pool->spec.layers.size()) return invalid(where + ": the model has no such layer");
  const control::LayerSpec& model = pool->spec.layers[memory.layer];
  if (memory.block_size < 1 || memory.num_blocks < 1 || memory.segments == nullptr) {
    return invalid(where + ": block_size, num_blocks and segments are needed");
  }
  control::LayerGroup group{{memory.layer}, memory.num_blocks, {"c", memory.block_size, {}, false}};
  for (std::size_t at = 0; at < model.segments.size(); ++at) {
    const hetkv_segment_memory& given = memory.segments[at];
    const std::string& name = model.segments[at].name;
    if (given.base == nullptr) return invalid(where + ", " + name + ": its base is NULL");
    if (given.dtype < HETKV_FLOAT32 || given.dtype > HETKV_UINT8) return invalid(where + ", " + name + ": its dtype");
    control::SegmentLayout part;
    part.dtype = static_cast<DType>(given.dtype);
    part.heads = pool->shard().heads[memory.layer].size();
    part.channels = model.segments[at].channels;
    part.block_stride = static_cast<std::int64_t>(given.block_stride);
    part.token_stride = static_cast<std::int64_t>(given.token_stride);
    part.head_stride = static_cast<std::int64_t>(given.head_stride);
    part.inner_stride =
        given.channel_stride > 0 ? static_cast<std::int64_t>(given.channel_stride) : item_size(part.dtype);
    part.pack = given.pack > 0 ? static_cast<std::int64_t>(given.pack) : part.channels;
    part.outer_stride = static_cast<std::int64_t>(given.pack_stride);
    if (given.num_scales > 0) {
      if (given.scales == nullptr) return invalid(where + ", " + name + ": its scales are NULL");
      part.scale = control::Scale{{given.scales, given.scales + given.num_scales}};
    }
    if (part.pack < 1 || part.channels % part.pack != 0) return invalid(where + ", " + name + ": its pack");
    if (!nests(part, memory.block_size, memory.num_blocks)) {
      return invalid(where + ", " + name + ": its elements overlap each other, or have strides that do not nest");
    }
    pool->bases[{memory.layer, name}] = reinterpret_cast<std::uint64_t>(given.base);
    group.layout.segments.emplace(name, std::move(part));
  }
  pool->layers.push_back(std::move(group));
  return {};
}

SegmentMap map_of(const control::SegmentLayout& part, std::int64_t block_size, std::uint64_t base) {
  return {base + static_cast<std::uint64_t>(part.offset),
          part.block_stride,
          part.token_stride,
          part.head_stride,
          part.outer_stride,
          part.inner_stride,
          static_cast<std::int32_t>(block_size),
          static_cast<std::int32_t>(part.pack),
          part.dtype};
}

}  // namespace

bool Pool::is_state(std::int64_t group) const {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [&](const control::LayerSpec& layer) { return layer.group == group && layer.kind == "state"; });
}

bool Pool::paging(std::int64_t group, std::int64_t* block_size, std::int64_t* blocks) const {
  bool found = false;
  for (const control::LayerGroup& at : layers) {
    if (spec.layers[static_cast<std::size_t>(at.layers[0])].group != group) continue;
    *block_size = at.layout.block_size;
    *blocks = found ? std::min(*blocks, at.blocks) : at.blocks;
    found = true;
  }
  return found;
}

Result Pool::check_blocks(std::int64_t group, const std::vector<std::int32_t>& ids, std::uint64_t start,
                          std::uint64_t stop) const {
  std::int64_t block_size = 0, blocks = 0;
  if (!paging(group, &block_size, &blocks) || start >= stop) return {};
  const std::uint64_t size = static_cast<std::uint64_t>(block_size), need = (stop + size - 1) / size;
  const std::string where = "cache group " + std::to_string(group) + ": ";
  if (ids.size() < need) {
    return invalid(where + "tokens up to " + std::to_string(stop) + " need " + std::to_string(need) + " blocks of " +
                   std::to_string(block_size) + ", not " + std::to_string(ids.size()));
  }
  std::set<std::int32_t> seen;
  for (std::uint64_t at = start / size; at < need; ++at) {
    const std::int32_t id = ids[at];
    if (id < 0 || id >= blocks) {
      return invalid(where + "block id " + std::to_string(id) + " is out of range, the pool has " +
                     std::to_string(blocks) + " blocks");
    }
    if (!seen.insert(id).second) return invalid(where + "block id " + std::to_string(id) + " is given twice");
  }
  return {};
}

wire::TokenRange Pool::wanted(std::int64_t group, std::uint64_t tokens, std::uint64_t cached) const {
  std::uint64_t reach = 0;
  bool windows = true;
  for (const control::LayerSpec& layer : spec.layers) {
    if (layer.group != group) continue;
    windows = windows && layer.sliding_window.has_value();
    reach = std::max(reach, static_cast<std::uint64_t>(layer.sliding_window.value_or(0)));
  }
  // The next token, number `tokens`, sees keys from `tokens - window + 1` on.
  std::uint64_t first = cached;
  if (windows && tokens + 1 > reach) first = std::max(cached, tokens + 1 - reach);
  return {std::min(first, tokens), tokens};
}

Result make_pool(const hetkv_pool_config& config, std::shared_ptr<const Pool>* out) {
  if (config.struct_bytes != sizeof(hetkv_pool_config)) return invalid("struct_bytes: use HETKV_INIT");
  auto pool = std::make_shared<Pool>();
  Result result = read_spec(config, &pool->spec);
  if (!result.ok()) return result;
  const std::int64_t tp = std::max(1u, config.tp), pp = std::max(1u, config.pp);
  if (tp * pp > 4096 || config.rank >= tp * pp) {
    return invalid("rank " + std::to_string(config.rank) + " of tp " + std::to_string(tp) + " x pp " +
                   std::to_string(pp));
  }
  for (const control::LayerSpec& layer : pool->spec.layers) {
    for (const control::Segment& segment : layer.segments) {
      if (segment.heads < 1 || segment.channels < 1)
        return invalid("segment " + segment.name + " has no heads or channels");
    }
  }
  pool->rank = config.rank;
  pool->device = config.device == nullptr ? "cpu" : config.device;
  for (std::int64_t stage = 0; stage < pp; ++stage) {
    for (std::int64_t at = 0; at < tp; ++at) pool->shards.push_back(control::Shard::of(pool->spec, tp, at, pp, stage));
  }
  for (std::uint32_t at = 0; at < config.num_memory; ++at) {
    result = read_memory(config.memory[at], pool.get());
    if (!result.ok()) return result;
  }
  control::Description whole;  // what a peer would check
  whole.role = control::Role::kSender;
  whole.instance = whole.host = "c";
  whole.spec = pool->spec;
  whole.shard = pool->shard();
  whole.instance_shards = pool->shards;
  whole.rank = pool->rank;
  whole.layers = pool->layers;
  whole.heartbeat_interval_ms = whole.heartbeat_timeout_ms = whole.lease_ms = 1;
  const Status status = whole.check();
  if (!status.ok()) return invalid(status.detail);
  *out = std::move(pool);
  return {};
}

std::vector<engine::LayerPlan> link_plans(const Pool& pool, const control::Agreement& agreement, bool sends) {
  std::vector<engine::LayerPlan> out;
  for (const control::LayerRoute& at : agreement.layers) {
    const control::LayerSpec& model = pool.spec.layers[static_cast<std::size_t>(at.layer)];
    const auto group = std::find_if(pool.layers.begin(), pool.layers.end(),
                                    [&](const control::LayerGroup& one) { return one.layers[0] == at.layer; });
    engine::LayerPlan plan;
    plan.layer = static_cast<std::uint32_t>(at.layer);
    plan.group = static_cast<std::uint16_t>(model.group);
    plan.head_start = static_cast<std::uint32_t>(at.heads.start);
    plan.head_stop = static_cast<std::uint32_t>(at.heads.stop);
    const std::int64_t first = at.heads.start - pool.shard().heads[static_cast<std::size_t>(at.layer)].start;
    for (std::size_t part = 0; part < model.segments.size(); ++part) {
      const std::string& name = model.segments[part].name;
      const control::SegmentLayout& layout = group->layout.segments.at(name);
      engine::SegmentPlan segment;
      segment.pool = map_of(layout, group->layout.block_size, pool.bases.at({at.layer, name}));
      segment.first_head = static_cast<std::int32_t>(first);
      segment.channels = static_cast<std::int32_t>(layout.channels);
      segment.wire_dtype = at.conversions[part].wire;
      const std::vector<double>& factors = sends ? at.conversions[part].pack : at.conversions[part].unpack;
      for (const double factor : factors) segment.multipliers.push_back(static_cast<float>(factor));
      plan.segments.push_back(std::move(segment));
    }
    out.push_back(std::move(plan));
  }
  return out;
}

}  // namespace hetkv::capi
