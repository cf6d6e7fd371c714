// remap: copy elements from any map to any other, converting their dtype on the way. Pack is pool -> frame, unpack is
// frame -> pool. This header is the contract; the CPU kernels are in this folder, the GPU ones under backend/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "map.h"

namespace hetkv::remap {

// One side of a move. `blocks` points to int32 block ids that stay valid until the remap has completed.
struct Side {
  SegmentMap map;
  const std::int32_t* blocks = nullptr;  // null where the map is not paged
  std::int64_t first_token = 0;          // index into the sequence, not into a block
  std::int32_t first_head = 0;           // local head of that side
};

enum class WireSide : std::uint8_t { kNone = 0, kSource = 1, kDestination = 2 };

// The scales of one side, float32: element = code * scale. A map of their own, whose channels are the groups of
// `channels_per_scale` channels each; block table, first token and first head are the side's. With head_stride 0 all
// heads of the pool share them.
struct Scales {
  SegmentMap map;  // base 0: this side has no scales, or they move in a job of their own
  std::int32_t channels_per_scale = 0;
};

// Moves `tokens x heads x channels` elements of one segment. dst = convert(src * multiplier[head]), computed in
// float32, rounded to nearest even, saturating to the target's largest finite value (NaN stays NaN); convert.h has the
// rules. Equal dtypes with no multipliers are moved bit for bit; int8 and uint8 are only moved. Source and destination
// memory do not overlap.
//
// With scales on either side, for each token, head and group of channels, in float32 (convert.h has the functions):
//   multiplier = source's scale * multipliers[head], each 1.0 where there is none
//   only the source has scales:     dst = convert(src * multiplier)
//   the destination has scales:     scale = scale_of(largest |src| * multiplier over the destination's group, ...)
//                                   dst = convert(src * factor_of(multiplier, scale)), and the scale is written
// int8 converts here; both dtypes are floats or int8. The channels of a group of one side divide those of the other.
struct Job {
  Side src;
  Side dst;
  std::int64_t tokens = 0;
  std::int32_t heads = 0;
  std::int32_t channels = 0;
  const float* multipliers = nullptr;  // one per head of the job, or null for 1.0
  // The side that is a wire payload, if any: its bytes are summed into the checksum (remap/checksum.h).
  // A wire side is always a canonical map whose base is the first byte of the job's part of the payload.
  WireSide wire = WireSide::kNone;
  std::uint64_t wire_offset = 0;  // of that part from the start of the payload, in bytes; a multiple of 8
  Scales src_scales, dst_scales;
  bool joint = false;  // the destination's scales are one for all heads of the job, not one a head
  float largest =
      0;  // code that the largest magnitude of a group becomes where its scale is found; 0: the dtype's largest
  std::uint64_t wire_scale_offset = 0;  // as wire_offset, of the scales of the wire side, which are canonical too

  bool scaled() const { return src_scales.map.base != 0 || dst_scales.map.base != 0; }
};

struct Result {
  std::uint64_t checksum = 0;   // sum over all jobs; meaningful where every job has a wire side
  std::uint64_t saturated = 0;  // finite or infinite sources that did not fit the target and were clamped
};

// Runs the jobs on up to `threads` threads (the caller's own included) and returns when all are done. `seed` keys the
// checksum. Never allocates on the hot path for one thread; never throws. The jobs are trusted: bounds are the
// caller's.
Result remap_cpu(const Job* jobs, std::size_t num_jobs, std::uint64_t seed, int threads) noexcept;

// Whether remap_cpu reads the payload of such a job twice, to sum it and to move it: where a peer may write to the
// payload meanwhile, the job is to be given a copy. All other jobs move what they sum.
bool reads_twice(const Job& job);

// One frame of a bundle: its jobs, after those of the frame before, the key of its checksum, and what was found.
struct Frame {
  std::size_t num_jobs = 0;
  std::uint64_t seed = 0;
  Result result;
};

// remap_cpu for each frame. Small frames share the threads, one each at a time; the next one is fetched while one is
// moved.
void remap_frames_cpu(const Job* jobs, Frame* frames, std::size_t num_frames, int threads) noexcept;

}  // namespace hetkv::remap
