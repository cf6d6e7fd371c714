// A map says where element (token, head, channel) of one segment lives. Every layout is a map, the wire's own included,
// so pack, unpack and re-layout are one operation: remap (remap/remap.h). Python's side of it is hetkv/kv/layout.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HETKV_HD __host__ __device__
#else
#define HETKV_HD
#endif

namespace hetkv {

// Codes are those of the wire (docs/wire-format.md) and of hetkv/kv/dtypes.py.
enum class DType : std::uint8_t {
  kFloat32 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kFloat8E4M3FN = 4,
  kFloat8E4M3FNUZ = 5,
  kFloat8E5M2 = 6,
  kFloat8E5M2FNUZ = 7,
  kInt8 = 8,
  kUInt8 = 9,  // opaque: moved, never converted
};

HETKV_HD constexpr int item_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : (dtype == DType::kFloat16 || dtype == DType::kBFloat16) ? 2 : 1;
}

// Strides are bytes. `base` already includes the segment's offset. With `block_size` 0 the tokens are not paged: they
// all are in block 0 and no block table is read (the wire, staging buffers).
struct SegmentMap {
  std::uint64_t base = 0;
  std::int64_t block_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;
  std::int32_t block_size = 0;
  std::int32_t pack = 0;  // channels of one inner run; the number of channels where the axis is not split
  DType dtype = DType::kUInt8;
};

// The one address function. `blocks` is the sequence's block table (int32, in token order) where the map is paged.
HETKV_HD inline std::uint64_t address(const SegmentMap& map, const std::int32_t* blocks, std::int64_t token,
                                      std::int32_t head, std::int32_t channel) {
  std::int64_t block = 0;
  if (map.block_size > 0) {
    block = blocks[token / map.block_size];
    token %= map.block_size;
  }
  return map.base +
         static_cast<std::uint64_t>(block * map.block_stride + token * map.token_stride + head * map.head_stride +
                                    (channel / map.pack) * map.outer_stride + (channel % map.pack) * map.inner_stride);
}

// The wire's canonical layout of one segment: `[head][token][channel]`, C order, from `base`.
HETKV_HD constexpr SegmentMap canonical_map(std::uint64_t base, std::int64_t tokens, std::int32_t channels,
                                            DType dtype) {
  const std::int64_t size = item_size(dtype);
  return SegmentMap{base, 0, channels * size, tokens * channels * size, 0, size, 0, channels, dtype};
}

}  // namespace hetkv
