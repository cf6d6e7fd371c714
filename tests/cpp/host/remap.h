// Functions of the table about remaps: the definition of one, element by element.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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

inline void run_job(const hetkv::remap::Job& job, std::uint64_t seed, hetkv::remap::Result* result) {
  const DType from = job.src.map.dtype;
  const DType to = job.dst.map.dtype;
  const bool moves = from == to && job.multipliers == nullptr;
  for (std::int32_t head = 0; head < job.heads; ++head) {
    for (std::int64_t token = 0; token < job.tokens; ++token) {
      for (std::int32_t channel = 0; channel < job.channels; ++channel) {
        const auto at = [&](const hetkv::remap::Side& side) {
          return address(side.map, side.blocks, side.first_token + token, side.first_head + head, channel);
        };
        std::uint32_t code = load(at(job.src), item_size(from));
        if (!moves) {
          const float scale = job.multipliers != nullptr ? job.multipliers[head] : 1.0f;
          bool saturated = false;
          code = encode(format_of(to), decode(format_of(from), code) * scale, &saturated);
          result->saturated += saturated ? 1 : 0;
        }
        std::memcpy(reinterpret_cast<void*>(at(job.dst)), &code, static_cast<std::size_t>(item_size(to)));
      }
    }
  }
  if (job.wire == hetkv::remap::WireSide::kNone) return;
  const SegmentMap& wire = job.wire == hetkv::remap::WireSide::kDestination ? job.dst.map : job.src.map;
  const std::int64_t bytes = job.tokens * job.heads * job.channels * item_size(wire.dtype);
  for (std::int64_t at = 0; at < bytes; at += 8) {
    std::uint64_t word = 0;
    auto* data = reinterpret_cast<std::uint8_t*>(wire.base + static_cast<std::uint64_t>(at));
    std::memcpy(&word, data, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - at)));
    if (job.wire == hetkv::remap::WireSide::kDestination) std::memcpy(data, &word, 8);
    result->checksum += hetkv::remap::checksum_mix(word, (job.wire_offset + static_cast<std::uint64_t>(at)) / 8, seed);
  }
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
