// A remap job that owns its block tables and multipliers, as Python makes it (remap.cpp) and others run it.
#pragma once

#include <string>
#include <vector>

#include "bind.h"
#include "remap/remap.h"

namespace hetkv {

[[noreturn]] void raise_input_error(const std::string& text);

inline void require(bool holds, const std::string& text) {
  if (!holds) raise_input_error(text);
}

// A side, the block table that it points to, and its scales.
struct OwnedSide {
  SegmentMap map;
  std::vector<std::int32_t> blocks;
  std::int64_t first_token = 0;
  std::int32_t first_head = 0;
  hetkv::remap::Scales scales;
};

struct OwnedJob {
  OwnedSide src, dst;
  std::int64_t tokens = 0;
  std::int32_t heads = 0;
  std::int32_t channels = 0;
  std::vector<float> multipliers;
  hetkv::remap::WireSide wire = hetkv::remap::WireSide::kNone;
  std::uint64_t wire_offset = 0;
  bool joint = false;
  std::uint64_t wire_scale_offset = 0;
  float largest = 0;

  bool scaled() const { return src.scales.map.base != 0 || dst.scales.map.base != 0; }

  hetkv::remap::Job view() const {
    hetkv::remap::Job job;
    job.src = {src.map, src.map.block_size > 0 ? src.blocks.data() : nullptr, src.first_token, src.first_head};
    job.dst = {dst.map, dst.map.block_size > 0 ? dst.blocks.data() : nullptr, dst.first_token, dst.first_head};
    job.tokens = tokens;
    job.heads = heads;
    job.channels = channels;
    job.multipliers = multipliers.empty() ? nullptr : multipliers.data();
    job.wire = wire;
    job.wire_offset = wire_offset;
    job.src_scales = src.scales;
    job.dst_scales = dst.scales;
    job.joint = joint;
    job.wire_scale_offset = wire_scale_offset;
    job.largest = largest;
    return job;
  }
};

}  // namespace hetkv
