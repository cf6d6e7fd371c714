// A coded part of a payload: docs/wire-format.md, section 10, has the same table. Values of 16 bits in two planes, of
// which the one that holds the exponents goes through zstd. Bit for bit, whatever the bytes are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/zstd.h"
#include "status.h"

namespace hetkv::codec {

enum class Values : std::uint8_t {
  kNone = 0,      // there is nothing to gain: never on the wire
  kBfloat16 = 1,  // turned left by one bit, so that the exponent is one byte
  kFloat16 = 2,
};

struct PartHeader {
  std::uint32_t plain_bytes = 0;  // even, not 0; above the bytes of the whole coded part
  Values values = Values::kNone;
  std::uint8_t zeros[3] = {};
};
static_assert(sizeof(PartHeader) == 8 && offsetof(PartHeader, values) == 4);

// Needs has_zstd().
class PartEncoder {
 public:
  // False: the part does not become smaller, or has an odd number of bytes. `data` is at an even address.
  bool encode(Values values, const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out);

 private:
  ZstdEncoder zstd_;
  std::vector<std::uint8_t> plane_;
};

// Reads and checks the header of `size` coded bytes. Parts of more than `most` plain bytes are malformed.
Status read_header(const std::uint8_t* data, std::size_t size, std::size_t most, PartHeader* out);

class PartDecoder {
 public:
  // `header` is what read_header() made of the same bytes; `to`, at an even address, has room for the plain bytes.
  // Not ok: nothing has been written.
  Status decode(const PartHeader& header, const std::uint8_t* data, std::size_t size, std::uint8_t* to);

 private:
  ZstdDecoder zstd_;
  std::vector<std::uint8_t> plane_;
};

}  // namespace hetkv::codec
