// Byte layout of every message: the one place in C++ that states offsets. docs/wire-format.md has the same tables.
// The structs are what is on the wire (little-endian, natural alignment, no padding), so a bounded memcpy reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "wire/message.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the wire is little-endian, and so is every host hetkv runs on");

namespace hetkv::wire {

constexpr std::uint32_t kMagic = 0x31564B48;  // the bytes "HKV1"
constexpr std::size_t kMacBytes = 8;          // last bytes of every message

struct PreludeBytes {
  std::uint32_t magic;
  std::uint8_t major;
  std::uint8_t minor;
  std::uint16_t type;
  std::uint32_t length;
  std::uint32_t reserved;
  std::uint64_t sequence;
  std::uint8_t request[16];
  std::uint64_t epoch;
};
static_assert(sizeof(PreludeBytes) == 48);
static_assert(offsetof(PreludeBytes, major) == 4 && offsetof(PreludeBytes, minor) == 5);
static_assert(offsetof(PreludeBytes, type) == 6 && offsetof(PreludeBytes, length) == 8);
static_assert(offsetof(PreludeBytes, reserved) == 12 && offsetof(PreludeBytes, sequence) == 16);
static_assert(offsetof(PreludeBytes, request) == 24 && offsetof(PreludeBytes, epoch) == 40);

// Bodies start at byte 48 of the message; offsets below are from there.
// What a frame is, without where it travels.
struct FrameIdentityBytes {
  std::uint16_t group;
  std::uint16_t segments;
  std::uint32_t layer;
  std::uint32_t head_start;
  std::uint32_t head_stop;
  std::uint64_t token_start;
  std::uint64_t token_stop;
  std::uint8_t dtypes[kMaxSegments];
  std::uint8_t scale_encoding;
  std::uint8_t codec;
  std::uint16_t reserved;
  std::uint32_t channels[kMaxSegments];
};
static_assert(sizeof(FrameIdentityBytes) == 56);
static_assert(offsetof(FrameIdentityBytes, segments) == 2 && offsetof(FrameIdentityBytes, layer) == 4);
static_assert(offsetof(FrameIdentityBytes, head_start) == 8 && offsetof(FrameIdentityBytes, head_stop) == 12);
static_assert(offsetof(FrameIdentityBytes, token_start) == 16 && offsetof(FrameIdentityBytes, token_stop) == 24);
static_assert(offsetof(FrameIdentityBytes, dtypes) == 32 && offsetof(FrameIdentityBytes, scale_encoding) == 36);
static_assert(offsetof(FrameIdentityBytes, codec) == 37 && offsetof(FrameIdentityBytes, reserved) == 38);
static_assert(offsetof(FrameIdentityBytes, channels) == 40);

struct FrameBytes {
  FrameIdentityBytes identity;
  std::uint32_t slot;
  std::uint32_t generation;
  std::uint64_t payload_length;
  std::uint64_t checksum;
  std::uint64_t saturated;
};
static_assert(sizeof(FrameBytes) == 88);
static_assert(offsetof(FrameBytes, slot) == 56);
static_assert(offsetof(FrameBytes, generation) == 60 && offsetof(FrameBytes, payload_length) == 64);
static_assert(offsetof(FrameBytes, checksum) == 72 && offsetof(FrameBytes, saturated) == 80);

// What checksum_seed() hashes.
struct IdentityBytes {
  std::uint8_t request[16];
  std::uint64_t epoch;
  FrameIdentityBytes frame;
};
static_assert(sizeof(IdentityBytes) == 80);

struct BundleBytes {  // then the records
  std::uint32_t slot;
  std::uint32_t generation;
  std::uint32_t num_frames;
  std::uint32_t reserved;
};
struct RecordBytes {
  IdentityBytes identity;
  std::uint64_t payload_offset;
  std::uint64_t payload_length;
  std::uint64_t checksum;
  std::uint64_t saturated;
};
static_assert(sizeof(BundleBytes) == 16 && sizeof(RecordBytes) == 112);
static_assert(offsetof(RecordBytes, payload_offset) == 80 && offsetof(RecordBytes, payload_length) == 88);
static_assert(offsetof(RecordBytes, checksum) == 96 && offsetof(RecordBytes, saturated) == 104);

struct TicketBytes {
  std::uint32_t lease_ms;
  std::uint32_t num_groups;
};
struct BoundTicketBytes {  // then ranges, as in a ticket
  std::uint32_t lease_ms;
  std::uint32_t num_groups;
  std::uint8_t content[16];
};
struct RangeBytes {
  std::uint64_t start;
  std::uint64_t stop;
};
static_assert(sizeof(TicketBytes) == 8 && sizeof(RangeBytes) == 16 && sizeof(BoundTicketBytes) == 24);
static_assert(offsetof(BoundTicketBytes, num_groups) == 4 && offsetof(BoundTicketBytes, content) == 8);

struct ListBytes {  // grant, release, recall
  std::uint32_t num_slots;
  std::uint32_t reserved;
};
struct SlotGrantBytes {  // then the rkey, zero-padded to 8 bytes
  std::uint32_t slot;
  std::uint32_t generation;
  std::uint64_t address;
  std::uint64_t bytes;
  std::uint32_t rkey_length;
  std::uint32_t reserved;
};
struct SlotNameBytes {
  std::uint32_t slot;
  std::uint32_t generation;
};
static_assert(sizeof(ListBytes) == 8 && sizeof(SlotGrantBytes) == 32 && sizeof(SlotNameBytes) == 8);
static_assert(offsetof(SlotGrantBytes, address) == 8 && offsetof(SlotGrantBytes, rkey_length) == 24);

struct DoneBytes {
  std::uint64_t frames;
  std::uint64_t payload_bytes;
};
struct AbortBytes {  // then the reason, zero-padded to 8 bytes
  std::uint32_t code;
  std::uint32_t reason_length;
};
struct HeartbeatBytes {
  std::uint64_t clock_ns;
};
static_assert(sizeof(DoneBytes) == 16 && sizeof(AbortBytes) == 8 && sizeof(HeartbeatBytes) == 8);

constexpr std::size_t kMinMessageBytes = sizeof(PreludeBytes) + kMacBytes;

constexpr std::size_t padded(std::size_t bytes) {
  return (bytes + 7) / 8 * 8;
}

// Smallest body of a type, and whether every body of the type has that size.
struct BodySize {
  std::size_t bytes;
  bool fixed;
};
constexpr BodySize body_size(Type type) {
  switch (type) {
    case Type::kFrame:
      return {sizeof(FrameBytes), true};
    case Type::kBundle:
      return {sizeof(BundleBytes), false};
    case Type::kTicket:
      return {sizeof(TicketBytes), false};
    case Type::kBoundTicket:
      return {sizeof(BoundTicketBytes), false};
    case Type::kGrant:
    case Type::kRelease:
    case Type::kRecall:
      return {sizeof(ListBytes), false};
    case Type::kDone:
      return {sizeof(DoneBytes), true};
    case Type::kAbort:
      return {sizeof(AbortBytes), false};
    case Type::kHeartbeat:
      return {sizeof(HeartbeatBytes), true};
    case Type::kWant:
    case Type::kHostOnly:
    case Type::kBye:
      return {0, true};
  }
  return {0, true};
}

}  // namespace hetkv::wire
