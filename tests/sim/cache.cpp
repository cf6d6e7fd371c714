#include "cache.h"

#include <algorithm>
#include <cstring>

namespace hetkv::sim {
namespace {

constexpr std::int32_t kBlocks = 48;  // of each group
constexpr std::int32_t kMostChannels = 7;

}  // namespace

Model Model::draw(Random& random) {
  Model model;
  model.layers = static_cast<std::uint32_t>(random.between(1, 3));
  model.groups = static_cast<std::uint32_t>(random.between(1, std::min(model.layers, 2u)));
  model.heads = 2;
  const std::uint64_t segments = random.between(1, 2);
  for (std::uint64_t i = 0; i < segments; ++i) {
    model.channels.push_back(static_cast<std::int32_t>(random.between(1, kMostChannels)));
  }
  return model;
}

std::uint8_t element(std::uint64_t content, std::uint32_t layer, std::size_t segment, std::uint32_t head,
                     std::uint64_t token, std::int32_t channel) {
  const std::uint64_t place =
      (((token * 4 + layer) * 4 + segment) * 4 + head) * 8 + static_cast<std::uint64_t>(channel);
  return static_cast<std::uint8_t>(mix(content + place * 0x9E3779B97F4A7C15ull));
}

Cache::Cache(World& world, const Model& model, std::uint32_t first, std::uint32_t last)
    : world_(world), model_(model), first_(first), last_(last), by_head_(world.random.chance(0.5)) {
  const auto heads = static_cast<std::int32_t>(last - first);
  for (std::uint32_t group = 0; group < model.groups; ++group) {
    block_size_.push_back(static_cast<std::int32_t>(world.random.between(1, 5)));
    auto& unused = unused_.emplace_back();
    for (std::int32_t block = 0; block < kBlocks; ++block) unused.push_back(block);
  }
  std::uint64_t end = 0;
  for (std::uint32_t layer = 0; layer < model.layers; ++layer) {
    for (const std::int32_t channels : model.channels) {
      bases_.push_back(end);
      end += static_cast<std::uint64_t>(kBlocks * block_size_[model.group_of(layer)] * heads * channels);
    }
  }
  bytes_.resize((end + 7) / 8 * 8);
  for (auto& byte : bytes_) byte = static_cast<std::uint8_t>(world.random.next());
  shadow_ = bytes_;
  shut_.assign(bytes_.size(), 0xff);
}

SegmentMap Cache::map(std::uint32_t layer, std::size_t segment) const {
  const std::int64_t heads = last_ - first_;
  const std::int64_t channels = model_.channels[segment];
  const std::int32_t size = block_size_[model_.group_of(layer)];
  SegmentMap map;
  map.base = address() + bases_[layer * model_.channels.size() + segment];
  map.block_stride = size * heads * channels;
  map.token_stride = by_head_ ? channels : heads * channels;
  map.head_stride = by_head_ ? size * channels : channels;
  map.inner_stride = 1;
  map.block_size = size;
  map.pack = static_cast<std::int32_t>(channels);
  return map;
}

engine::LayerPlan Cache::plan(std::uint32_t layer, std::uint32_t head_start, std::uint32_t head_stop) const {
  engine::LayerPlan plan;
  plan.layer = layer;
  plan.group = static_cast<std::uint16_t>(model_.group_of(layer));
  plan.head_start = head_start;
  plan.head_stop = head_stop;
  for (std::size_t segment = 0; segment < model_.channels.size(); ++segment) {
    engine::SegmentPlan& made = plan.segments.emplace_back();
    made.pool = map(layer, segment);
    made.first_head = static_cast<std::int32_t>(head_start - first_);
    made.channels = model_.channels[segment];
  }
  return plan;
}

Blocks Cache::take(const std::vector<std::uint64_t>& tokens) {
  Blocks blocks;
  for (std::uint32_t group = 0; group < model_.groups; ++group) {
    const auto size = static_cast<std::uint64_t>(block_size_[group]);
    const std::uint64_t need = (tokens[group] + size - 1) / size;
    if (need > unused_[group].size()) {
      give_back(blocks);
      return {};
    }
    auto& taken = blocks.emplace_back();
    for (std::uint64_t i = 0; i < need; ++i) {
      std::swap(unused_[group][world_.random.below(unused_[group].size())], unused_[group].back());
      taken.push_back(unused_[group].back());
      unused_[group].pop_back();
      ++taken_;
    }
  }
  return blocks;
}

void Cache::give_back(const Blocks& blocks) {
  for (std::size_t group = 0; group < blocks.size(); ++group) {
    const auto size = static_cast<std::uint64_t>(block_size_[group]);
    for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
      if (model_.group_of(layer) != group) continue;
      each(layer, {0, blocks[group].size() * size}, blocks, [&](std::size_t at, auto...) {
        shadow_[at] = bytes_[at] = static_cast<std::uint8_t>(world_.random.next());
        shut_[at] = 0xff;
      });
    }
    unused_[group].insert(unused_[group].end(), blocks[group].begin(), blocks[group].end());
    taken_ -= blocks[group].size();
  }
}

template <typename Visit>
void Cache::each(std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks, Visit visit) const {
  for (std::size_t segment = 0; segment < model_.channels.size(); ++segment) {
    const SegmentMap there = map(layer, segment);
    const std::int32_t* table = blocks[model_.group_of(layer)].data();
    for (std::uint64_t token = tokens.start; token < tokens.stop; ++token) {
      for (std::uint32_t head = first_; head < last_; ++head) {
        for (std::int32_t channel = 0; channel < model_.channels[segment]; ++channel) {
          const std::uint64_t at = hetkv::address(there, table, static_cast<std::int64_t>(token),
                                                  static_cast<std::int32_t>(head - first_), channel);
          visit(static_cast<std::size_t>(at - address()), segment, head, token, channel);
        }
      }
    }
  }
}

void Cache::compute(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks) {
  each(layer, tokens, blocks,
       [&](std::size_t at, std::size_t segment, std::uint32_t head, std::uint64_t token, std::int32_t channel) {
         shadow_[at] = bytes_[at] = element(content, layer, segment, head, token, channel);
       });
}

void Cache::open(wire::TokenRange tokens, std::uint32_t group, const Blocks& blocks) {
  for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
    if (model_.group_of(layer) == group) each(layer, tokens, blocks, [&](std::size_t at, auto...) { shut_[at] = 0; });
  }
}

bool Cache::holds(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks) const {
  bool same = true;
  each(layer, tokens, blocks,
       [&](std::size_t at, std::size_t segment, std::uint32_t head, std::uint64_t token, std::int32_t channel) {
         same = same && bytes_[at] == element(content, layer, segment, head, token, channel);
       });
  return same;
}

bool Cache::arrived(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks) {
  each(layer, tokens, blocks, [&](std::size_t at, auto...) {
    shadow_[at] = bytes_[at];
    shut_[at] = 0xff;
  });
  return holds(content, layer, tokens, blocks);
}

void Cache::shut(wire::TokenRange tokens, std::uint32_t group, const Blocks& blocks) {
  for (std::uint32_t layer = 0; layer < model_.layers; ++layer) {
    if (model_.group_of(layer) != group) continue;
    each(layer, tokens, blocks, [&](std::size_t at, auto...) {
      if (shut_[at] == 0) shadow_[at] = bytes_[at];
      shut_[at] = 0xff;
    });
  }
}

bool Cache::disturbed() const {
  for (std::size_t at = 0; at < bytes_.size(); at += 8) {
    std::uint64_t now;
    std::uint64_t then;
    std::uint64_t shut;
    std::memcpy(&now, bytes_.data() + at, 8);
    std::memcpy(&then, shadow_.data() + at, 8);
    std::memcpy(&shut, shut_.data() + at, 8);
    if (((now ^ then) & shut) != 0) return true;
  }
  return false;
}

}  // namespace hetkv::sim
