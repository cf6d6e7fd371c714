#include "codec/nibbles.h"

#include <cstring>

namespace hetkv::codec {
namespace {

constexpr std::size_t kHalf = kNibbleBlock / 2;

// Plain loops over blocks of a fixed size, which compilers make vector code of.
bool fits(const std::uint8_t* __restrict block) {
  std::uint8_t beyond = 0;
  for (std::size_t i = 0; i < kNibbleBlock; ++i) {
    beyond = static_cast<std::uint8_t>(beyond | (static_cast<std::uint8_t>(block[i] + 8) & 0xF0));
  }
  return beyond == 0;
}

void pack(const std::uint8_t* __restrict block, std::uint8_t* __restrict out) {
  for (std::size_t i = 0; i < kHalf; ++i) {
    out[i] = static_cast<std::uint8_t>((block[i] & 0x0F) | (block[i + kHalf] << 4));
  }
}

void unpack(const std::uint8_t* __restrict packed, std::uint8_t* __restrict out) {
  for (std::size_t i = 0; i < kHalf; ++i) {
    out[i] = static_cast<std::uint8_t>(((packed[i] & 0x0F) ^ 8) - 8);
    out[i + kHalf] = static_cast<std::uint8_t>(((packed[i] >> 4) ^ 8) - 8);
  }
}

bool bit(const std::uint8_t* bits, std::size_t at) {
  return (bits[at / 8] >> (at % 8) & 1) != 0;
}

}  // namespace

std::size_t pack_nibbles(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out) {
  const std::size_t blocks = bytes / kNibbleBlock;
  std::uint8_t* const bits = out;
  std::memset(bits, 0, (blocks + 7) / 8);
  out += (blocks + 7) / 8;
  for (std::size_t at = 0; at < blocks; ++at, data += kNibbleBlock) {
    if (fits(data)) {
      bits[at / 8] = static_cast<std::uint8_t>(bits[at / 8] | 1u << at % 8);
      pack(data, out);
      out += kHalf;
    } else {
      std::memcpy(out, data, kNibbleBlock);
      out += kNibbleBlock;
    }
  }
  std::memcpy(out, data, bytes % kNibbleBlock);
  return static_cast<std::size_t>(out - bits) + bytes % kNibbleBlock;
}

bool is_packed(const std::uint8_t* data, std::size_t size, std::size_t bytes) {
  const std::size_t blocks = bytes / kNibbleBlock;
  const std::size_t head = (blocks + 7) / 8;
  if (size < head) return false;
  std::size_t packed = 0;
  for (std::size_t at = 0; at < 8 * head; ++at) {
    if (!bit(data, at)) continue;
    if (at >= blocks) return false;
    ++packed;
  }
  return size == head + bytes - kHalf * packed;
}

void unpack_nibbles(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out) {
  const std::size_t blocks = bytes / kNibbleBlock;
  const std::uint8_t* const bits = data;
  data += (blocks + 7) / 8;
  for (std::size_t at = 0; at < blocks; ++at, out += kNibbleBlock) {
    if (bit(bits, at)) {
      unpack(data, out);
      data += kHalf;
    } else {
      std::memcpy(out, data, kNibbleBlock);
      data += kNibbleBlock;
    }
  }
  std::memcpy(out, data, bytes % kNibbleBlock);
}

}  // namespace hetkv::codec
