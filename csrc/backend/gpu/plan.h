// How one remap job runs on a GPU: decided on the host at each launch, read by every thread.
//
// A job is cut into chunks, one for a thread block of kThreads threads at a time:
// - move16, move8, convert: both sides hold runs of channels that are contiguous and aligned. An item is one run of 16
//   or 8 bytes (convert: 8 elements) of kDepth tokens, so that a thread has kDepth loads in flight (rows.h).
// - cells: one side holds the tokens of a block next to each other (transposed V). An item is a cell of 8 tokens x 8
//   channels that turns round in registers (cells.h).
// - words: any map at all, one 8-byte word of the canonical order at a time (words.h).
// With scales for groups of channels:
// - quantise, apply: the wire's side has codes of 8 bits with scales, the other one values of 16 or 32 bits. An item is
//   8 channels of kDepth groups; the lanes that share a group are a cluster (groups.h).
// - scaled: any maps, dtypes and groups; a thread takes whole groups (scaled.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/gpu/fast_div.h"
#include "remap/remap.h"

namespace hetkv::gpu {

constexpr std::uint32_t kThreads = 256;
constexpr std::uint32_t kDepth = 4;  // tokens of one item, words of one thread
constexpr std::uint32_t kGroup = 8;  // elements that are converted or turned together

constexpr std::uint32_t kMaxCluster = 32;  // lanes, within a warp of any vendor
constexpr std::uint32_t kScaledUnits = 8;  // of an item of the scaled path: whole words, however small the groups are

enum class Path : std::uint8_t { kMove16, kMove8, kConvert, kCells, kWords, kQuantise, kApply, kScaled };

// One side of a job. An element's address is
//   base + head * head_stride + token_offset(token) + channel * inner_stride + (channel / pack) * pack_step.
struct Side {
  std::uint64_t base = 0;                // of the job's first head; where not paged also of its first token
  const std::int32_t* blocks = nullptr;  // null: not paged
  std::int64_t block_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t inner_stride = 0;
  std::int64_t pack_step = 0;     // outer_stride - pack * inner_stride
  std::uint32_t first_token = 0;  // of the sequence, where paged
  FastDiv block_size;
  FastDiv pack;  // in channels
  DType dtype = DType::kUInt8;
  bool tiled = true;  // rows, cells: the tokens of one item are in one block
};

// Scales of one side; base 0: it has none. That of group g of a token is at
//   base + head * head_stride + block * block_stride + token in its block * token_stride + g * group_stride.
struct ScaleSide {
  std::uint64_t base = 0;  // as of Side
  std::int64_t block_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t group_stride = 0;
  std::uint32_t channels = 0;  // that share one
};

// What every item needs is together, and what only words need at the end: a launch begins with fetching this from
// memory, a line at a time.
struct Job {
  std::uint64_t seed = 0;   // of its frame's checksum
  std::uint32_t frame = 0;  // of the launch
  std::uint32_t items = 0;  // rows, cells
  std::uint32_t tokens = 0;
  FastDiv lane_vectors;  // rows: vectors of a row that neighbouring lanes take, before the next token. cells: in a row
  FastDiv row_parts;     // rows: how many times that is a row
  FastDiv heads;         // rows, cells
  std::uint8_t log_lane_tokens = 0;  // tokens, or cells along the tokens, that neighbouring lanes take
  std::uint8_t lead = 0;             // cells: tokens of the first one that are before the job's first
  Path path = Path::kWords;
  remap::WireSide wire = remap::WireSide::kNone;
  bool converts = false;
  bool tokens_first = false;  // cells: it is the source whose tokens are contiguous
  bool whole_words = false;   // words: the destination is the wire's and can be stored in words
  bool wide = false;          // words: too many elements for 32-bit indices
  Side src;
  Side dst;
  std::uint64_t wire_origin = 0;  // 1 + index in the payload of the wire side's first word; rows, cells: of address 0
  std::uint64_t step_key = 0;     // rows: what the tokens from one vector of an item to its next add to a word's key
  std::uint64_t token_key = 0;    // cells: what one token adds to it, words of a token * remap::kChecksumStep
  const float* multipliers = nullptr;
  std::uint64_t elements = 0;  // words: all of the job's
  FastDiv token_count;         // words, and all below
  FastDiv channels;            // words
  // quantise, apply, scaled
  FastDiv row_groups;        // groups of a token and head
  std::uint32_t groups = 0;  // of the job. scaled: units, each of which is whole groups of both sides
  std::uint32_t group_channels = 0;
  std::uint8_t log_cluster = 0;    // quantise, apply: lanes of a cluster
  bool runs = false;               // quantise, apply: the values' channels are contiguous and aligned in eights
  bool joint = false;              // scaled
  float largest = 0;               // code of the largest magnitude of a group whose scale is found
  std::uint64_t scale_origin = 0;  // as wire_origin, of the wire's scales; scaled: of the first one
  ScaleSide src_scales;
  ScaleSide dst_scales;
};

// Jobs of a launch that go with it by value; more are in a table.
constexpr std::size_t kMaxLaunchJobs = 4;

struct Table {
  std::uint32_t first_chunk[kHetkvMaxJobs];  // of each job
  Job jobs[kHetkvMaxJobs];
};

// What one launch gets, by value.
struct Launch {
  const Table* table = nullptr;  // null: the jobs are below
  std::uint32_t num_frames = 0;
  std::uint32_t num_jobs = 0;
  std::uint32_t num_chunks = 0;
  std::uint32_t first_chunk[kMaxLaunchJobs] = {};
  Job jobs[kMaxLaunchJobs];
};

// Checksum and saturated elements that one thread has seen.
struct Partial {
  std::uint64_t checksum = 0;
  std::uint32_t saturated = 0;
};

// What the thread blocks of a launch add up, in device memory: all zero between launches.
struct Scratch {
  std::uint64_t sums[2 * kHetkvMaxFrames];  // checksum and saturated elements of each frame
  std::uint64_t blocks;                     // thread blocks that have added all they saw
};

// Whether a kernel can index the job: its tokens and those before them are fewer than 2^30, and the elements of a job
// with scales fewer than 2^31.
bool can_plan(const remap::Job& job);

// Plans the jobs of a launch's frames, each of which can be planned, and where the chunks of each job begin. Returns
// the number of chunks.
std::uint32_t plan_jobs(const remap::Job* jobs, const HetkvRemapFrame* frames, std::size_t num_frames, Job* out,
                        std::uint32_t* first_chunk);

}  // namespace hetkv::gpu
