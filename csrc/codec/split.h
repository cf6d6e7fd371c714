// Planes of 16-bit values: the bytes that hold the exponent, which an entropy coder makes small, and those of the
// mantissa, which it does not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hetkv::codec {

// Writes `count` values' upper bytes to `upper` and their lower ones to `lower`. With `turn` each value is turned left
// by one bit first: the upper byte of a bfloat16 is then its exponent. The buffers do not overlap. Any bits, NaN
// included.
void split16(const std::uint16_t* values, std::size_t count, bool turn, std::uint8_t* upper, std::uint8_t* lower);

// The inverse, bit for bit.
void join16(const std::uint8_t* upper, const std::uint8_t* lower, std::size_t count, bool turn, std::uint16_t* values);

}  // namespace hetkv::codec
