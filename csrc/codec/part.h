// A coded part of a payload: docs/wire-format.md, section 10, has the same tables. Values of 16 bits in two planes, of
// which the one that holds the exponents goes through zstd; or codes of four bits, two in a byte. Bit for bit, whatever
// the bytes are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/zstd.h"
#include "status.h"

namespace hetkv::codec {

enum class Values : std::uint8_t {
  kNone = 0,      // there is nothing to gain: never on the wire
  kBfloat16 = 1,  // turned left by one bit, so that the exponent is one byte
  kFloat16 = 2,
  kInt4 = 3,  // int8 from -8 to 7 (codec/nibbles.h)
};

// A set of kinds of values.
using ValuesMask = std::uint8_t;
constexpr ValuesMask mask_of(Values values) {
  return static_cast<ValuesMask>(values == Values::kNone ? 0 : 1u << static_cast<unsigned>(values));
}
constexpr ValuesMask kZstdValues = mask_of(Values::kBfloat16) | mask_of(Values::kFloat16);

struct PartHeader {
  std::uint32_t plain_bytes = 0;  // even, not 0; above the bytes of the whole coded part
  Values values = Values::kNone;
  std::uint8_t zeros[3] = {};
};
static_assert(sizeof(PartHeader) == 8 && offsetof(PartHeader, values) == 4);

// Needs has_zstd() for kZstdValues.
class PartEncoder {
 public:
  // False: the part does not become smaller, or has an odd number of bytes. `data` is at an even address.
  bool encode(Values values, const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out);

 private:
  std::optional<ZstdEncoder> zstd_;
  std::vector<std::uint8_t> plane_;
};

// Reads and checks the header of `size` coded bytes. Parts of more than `most` plain bytes are malformed, and of values
// that are not in `accept`.
Status read_header(const std::uint8_t* data, std::size_t size, std::size_t most, ValuesMask accept, PartHeader* out);

class PartDecoder {
 public:
  // `header` is what read_header() made of the same bytes; `to`, at an even address, has room for the plain bytes.
  // Not ok: nothing has been written.
  Status decode(const PartHeader& header, const std::uint8_t* data, std::size_t size, std::uint8_t* to);

 private:
  std::optional<ZstdDecoder> zstd_;
  std::vector<std::uint8_t> plane_;
};

}  // namespace hetkv::codec
