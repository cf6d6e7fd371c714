// The header of every frame on a stream between two ranks: docs/wire-format.md, section 10, has the same table. What
// follows the header is `length` bytes: a message, or a part of a payload, which goes into a slot.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "wire/siphash.h"

namespace hetkv::transport {

enum class FrameKind : std::uint8_t {
  kMessage = 1,  // `number`: parts of payloads that must be in their slots before it is delivered
  kPayload = 2,  // `number`: of this part on its link, from 0; slot, generation, `offset` in the slot
  kWindow = 3,   // no bytes, but a descriptor of the memory of a slot; `offset`: the memory's size
  kCoded = 4,    // as kPayload, but the bytes are a coded part (codec/part.h)
};

struct FrameHeader {
  std::uint32_t length = 0;
  FrameKind kind = FrameKind::kMessage;
  std::uint8_t zeros[3] = {};
  std::uint64_t number = 0;
  std::uint32_t slot = 0;
  std::uint32_t generation = 0;
  std::uint64_t offset = 0;
  std::uint64_t mac = 0;  // SipHash of all before it and of the frame's place in the stream
};
static_assert(sizeof(FrameHeader) == 40);
static_assert(offsetof(FrameHeader, kind) == 4 && offsetof(FrameHeader, number) == 8);
static_assert(offsetof(FrameHeader, slot) == 16 && offsetof(FrameHeader, generation) == 20);
static_assert(offsetof(FrameHeader, offset) == 24 && offsetof(FrameHeader, mac) == 32);

// Most bytes of a part, also before it is coded; and of any encrypted frame, without its header.
constexpr std::size_t kMostSealed = 256 * 1024;

inline std::uint64_t frame_mac(const FrameHeader& header, std::uint64_t place, const wire::SipKey& key) {
  std::uint8_t bytes[sizeof header];
  std::memcpy(bytes, &header, sizeof header);
  std::memcpy(bytes + offsetof(FrameHeader, mac), &place, sizeof place);
  return wire::siphash24(key, bytes, sizeof bytes);
}

}  // namespace hetkv::transport
