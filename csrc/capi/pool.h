// A pool of the C library: the description of one rank's memory, and the plans that a link to a peer needs.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "control/agreement.h"
#include "control/result.h"
#include "engine/config.h"
#include "wire/message.h"

namespace hetkv::capi {

struct Pool {
  control::Spec spec;
  std::vector<control::Shard> shards;  // of all ranks
  std::int64_t rank = 0;
  std::vector<control::LayerGroup> layers;
  std::map<std::pair<std::int64_t, std::string>, std::uint64_t> bases;
  std::string device;

  const control::Shard& shard() const { return shards[static_cast<std::size_t>(rank)]; }
  bool is_state(std::int64_t group) const;
  // Block size and block count of a cache group; false: none of this rank's layers is in it.
  bool paging(std::int64_t group, std::int64_t* block_size, std::int64_t* blocks) const;
  // HETKV_INPUT unless `ids` hold tokens [start, stop) of a cache group in distinct blocks.
  Result check_blocks(std::int64_t group, const std::vector<std::int32_t>& ids, std::uint64_t start,
                      std::uint64_t stop) const;
  // Tokens to ask for of a group: what is not cached, and of a sliding window only its reach.
  wire::TokenRange wanted(std::int64_t group, std::uint64_t tokens, std::uint64_t cached) const;
};

Result make_pool(const hetkv_pool_config& config, std::shared_ptr<const Pool>* out);

// Plans of this rank's side of a link.
std::vector<engine::LayerPlan> link_plans(const Pool& pool, const control::Agreement& agreement, bool sends);

}  // namespace hetkv::capi
