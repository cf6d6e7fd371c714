// Functions of the table about remaps: the definition of one, element by element.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "convert.h"
#include "host/options.h"
#include "host/streams.h"
#include "remap/checksum.h"

namespace hetkv::host {

inline std::atomic<int> remaps{0};  // since the options were set

inline std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot) {
  *slot = {new HetkvRemapResult[kHetkvMaxFrames](), nullptr, device};
  return kHetkvOk;
}

inline std::int32_t slot_destroy(HetkvRemapSlot* slot) {
  delete[] slot->results;
  return kHetkvOk;
}

inline std::uint32_t load(std::uint64_t from, int size) {
  std::uint32_t code = 0;
  std::memcpy(&code, reinterpret_cast<const void*>(from), static_cast<std::size_t>(size));
  return code;
}

inline float load_scale(std::uint64_t from) {
  return float_from_bits(load(from, 4));
}

// Address of the scale of a channel.
inline std::uint64_t scale_at(const hetkv::remap::Side& side, const hetkv::remap::Scales& scales, std::int64_t token,
                              std::int32_t head, std::int32_t channel) {
  return address(scales.map, side.blocks, side.first_token + token, side.first_head + head,
                 channel / scales.channels_per_scale);
}

// What the source's code of one element is multiplied by to be a value.
inline float multiplier_of(const hetkv::remap::Job& job, std::int64_t token, std::int32_t head, std::int32_t channel) {
  const float constant = job.multipliers != nullptr ? job.multipliers[head] : 1.0f;
  if (job.src_scales.map.base == 0) return constant;
  return load_scale(scale_at(job.src, job.src_scales, token, head, channel)) * constant;
}

// Finds the destination's scales.
inline void find_scales(const hetkv::remap::Job& job) {
  const std::int32_t group = job.dst_scales.channels_per_scale;
  const float largest = job.largest > 0 ? job.largest : largest_scaled(job.dst.map.dtype);
  for (std::int32_t head = 0; head < job.heads; ++head) {
    for (std::int64_t token = 0; token < job.tokens; ++token) {
      for (std::int32_t first = 0; first < job.channels; first += group) {
        float amax = 0;
        for (std::int32_t h = job.joint ? 0 : head; h < (job.joint ? job.heads : head + 1); ++h) {
          for (std::int32_t channel = first; channel < first + group; ++channel) {
            const std::uint64_t at =
                address(job.src.map, job.src.blocks, job.src.first_token + token, job.src.first_head + h, channel);
            const float value = decode_scaled(job.src.map.dtype, load(at, item_size(job.src.map.dtype)));
            amax = std::max(amax, std::fabs(value) * std::fabs(multiplier_of(job, token, h, channel)));
          }
        }
        const float scale = scale_of(amax, largest);
        std::memcpy(reinterpret_cast<void*>(scale_at(job.dst, job.dst_scales, token, head, first)), &scale, 4);
      }
    }
  }
}

// Checksum of `bytes` bytes of the wire, whose last word is filled up with zeros where it is the destination.
inline std::uint64_t sum_wire(std::uint64_t base, std::int64_t bytes, std::uint64_t offset, std::uint64_t seed,
                              bool writes) {
  std::uint64_t total = 0;
  for (std::int64_t at = 0; at < bytes; at += 8) {
    std::uint64_t word = 0;
    auto* data = reinterpret_cast<std::uint8_t*>(base + static_cast<std::uint64_t>(at));
    std::memcpy(&word, data, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - at)));
    if (writes) std::memcpy(data, &word, 8);
    total += hetkv::remap::checksum_mix(word, (offset + static_cast<std::uint64_t>(at)) / 8, seed);
  }
  return total;
}

inline void run_job(const hetkv::remap::Job& job, std::uint64_t seed, hetkv::remap::Result* result) {
  if (job.dst_scales.map.base != 0) find_scales(job);
  const DType from = job.src.map.dtype;
  const DType to = job.dst.map.dtype;
  const bool moves = from == to && job.multipliers == nullptr && !job.scaled();
  for (std::int32_t head = 0; head < job.heads; ++head) {
    for (std::int64_t token = 0; token < job.tokens; ++token) {
      for (std::int32_t channel = 0; channel < job.channels; ++channel) {
        const auto at = [&](const hetkv::remap::Side& side) {
          return address(side.map, side.blocks, side.first_token + token, side.first_head + head, channel);
        };
        std::uint32_t code = load(at(job.src), item_size(from));
        if (!moves) {
          float factor = multiplier_of(job, token, head, channel);
          if (job.dst_scales.map.base != 0) {
            factor = factor_of(factor, load_scale(scale_at(job.dst, job.dst_scales, token, head, channel)));
          }
          bool saturated = false;
          code = encode_scaled(to, decode_scaled(from, code) * factor, &saturated);
          result->saturated += saturated ? 1 : 0;
        }
        std::memcpy(reinterpret_cast<void*>(at(job.dst)), &code, static_cast<std::size_t>(item_size(to)));
      }
    }
  }
  if (job.wire == hetkv::remap::WireSide::kNone) return;
  const bool writes = job.wire == hetkv::remap::WireSide::kDestination;
  const SegmentMap& wire = writes ? job.dst.map : job.src.map;
  const hetkv::remap::Scales& scales = writes ? job.dst_scales : job.src_scales;
  const std::int64_t rows = job.tokens * job.heads;
  result->checksum += sum_wire(wire.base, rows * job.channels * item_size(wire.dtype), job.wire_offset, seed, writes);
  if (scales.map.base == 0) return;
  result->checksum += sum_wire(scales.map.base, rows * (job.channels / scales.channels_per_scale) * 4,
                               job.wire_scale_offset, seed, writes);
}

inline std::int32_t remap(void* stream, const hetkv::remap::Job* jobs, const HetkvRemapFrame* frames,
                          std::size_t num_frames, const HetkvRemapSlot* slot, std::int32_t) {
  const int turn = ++remaps;
  if (option("reject-remap") == turn) return fail(kHetkvFailed, "launch rejected");
  auto* results = const_cast<HetkvRemapResult*>(slot->results);
  std::size_t num_jobs = 0;
  for (std::size_t i = 0; i < num_frames; ++i) num_jobs += frames[i].num_jobs;
  if (num_frames > kHetkvMaxFrames || num_jobs > kHetkvMaxJobs) return fail(kHetkvInvalid, "too many jobs at once");
  const bool breaks = option("fail-remap") > 0 && turn >= option("fail-remap");
  static_cast<Stream*>(stream)->put([work = std::vector<hetkv::remap::Job>(jobs, jobs + num_jobs),
                                     parts = std::vector<HetkvRemapFrame>(frames, frames + num_frames), results,
                                     breaks] {
    if (const long us = option("slow"); us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
    if (breaks) broken = true;
    if (broken) return;
    const hetkv::remap::Job* job = work.data();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      hetkv::remap::Result sum;
      for (std::uint64_t left = parts[i].num_jobs; left > 0; --left, ++job) run_job(*job, parts[i].seed, &sum);
      results[i] = {sum.checksum, sum.saturated};
    }
  });
  return kHetkvOk;
}

}  // namespace hetkv::host
