// Codes of four bits that are stored as int8, two in a byte. Blocks of 64 bytes, of which those that hold such codes
// alone become 32; all else stays as it is, so that any bytes come back as they were.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hetkv::codec {

constexpr std::size_t kNibbleBlock = 64;

// Most bytes that pack_nibbles() writes.
constexpr std::size_t most_packed(std::size_t bytes) {
  return (bytes / kNibbleBlock + 7) / 8 + bytes;
}

// Writes a bit for each block, blocks, and the bytes after the last whole block: docs/wire-format.md, section 10.
// Returns the bytes written.
std::size_t pack_nibbles(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out);

// Whether `size` bytes are exactly what `bytes` bytes are packed in. Any bytes, also hostile ones.
[[nodiscard]] bool is_packed(const std::uint8_t* data, std::size_t size, std::size_t bytes);

// The inverse of pack_nibbles(), of what is_packed().
void unpack_nibbles(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out);

}  // namespace hetkv::codec
