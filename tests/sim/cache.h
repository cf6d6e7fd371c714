// A small KV pool of one simulated process, with what every byte of it must be.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/config.h"
#include "wire/message.h"
#include "world.h"

namespace hetkv::sim {

// The model: the same for all processes of a seed. One byte an element.
struct Model {
  std::uint32_t layers = 1;
  std::uint32_t groups = 1;  // layer i is of group i % groups
  std::uint32_t heads = 2;
  std::vector<std::int32_t> channels;  // by segment

  std::uint32_t group_of(std::uint32_t layer) const { return layer % groups; }
  static Model draw(Random& random);
};

// The byte of an element, by what made it.
std::uint8_t element(std::uint64_t content, std::uint32_t layer, std::size_t segment, std::uint32_t head,
                     std::uint64_t token, std::int32_t channel);

using Blocks = std::vector<std::vector<std::int32_t>>;  // by group

class Cache {
 public:
  // Of heads [first, last), in a layout of its own.
  Cache(World& world, const Model& model, std::uint32_t first, std::uint32_t last);

  const Model& model() const { return model_; }
  std::uint32_t first_head() const { return first_; }
  std::uint32_t last_head() const { return last_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(bytes_.data()); }
  std::size_t size() const { return bytes_.size(); }

  // Blocks for so many tokens of each group; empty where too few are free.
  Blocks take(const std::vector<std::uint64_t>& tokens);
  // They hold anything from now on, until they are taken again.
  void give_back(const Blocks& blocks);
  std::size_t taken() const { return taken_; }

  // This side computes these tokens.
  void compute(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks);
  // The engine may change these tokens of a layer, or of all, from now on.
  void open(wire::TokenRange tokens, std::uint32_t group, const Blocks& blocks);
  // It may not any more, and they are what that content is; false where they are not.
  bool arrived(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks);
  // It may not any more; they are whatever they are.
  void shut(wire::TokenRange tokens, std::uint32_t group, const Blocks& blocks);
  // Whether they still are that content.
  bool holds(std::uint64_t content, std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks) const;
  // Whether a byte changed that may not.
  bool disturbed() const;

  engine::LayerPlan plan(std::uint32_t layer, std::uint32_t head_start, std::uint32_t head_stop) const;

 private:
  SegmentMap map(std::uint32_t layer, std::size_t segment) const;
  template <typename Visit>
  void each(std::uint32_t layer, wire::TokenRange tokens, const Blocks& blocks, Visit visit) const;

  World& world_;
  const Model& model_;
  const std::uint32_t first_;
  const std::uint32_t last_;
  const bool by_head_;                    // [block][head][token], otherwise [block][token][head]
  std::vector<std::int32_t> block_size_;  // by group
  std::vector<std::uint64_t> bases_;      // by layer and segment, in bytes_
  std::vector<std::vector<std::int32_t>> unused_;
  std::size_t taken_ = 0;
  std::vector<std::uint8_t> bytes_;
  std::vector<std::uint8_t> shadow_;
  std::vector<std::uint8_t> shut_;  // 0xff: must be as in shadow_
};

}  // namespace hetkv::sim
