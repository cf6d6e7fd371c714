// Messages of wire format v1, as docs/wire-format.md defines them. A message is a prelude, a body and a MAC,
// little-endian, every field at its natural alignment. Encoding and decoding are the only code that knows the byte
// offsets.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "status.h"
#include "wire/siphash.h"

namespace hetkv::wire {

constexpr std::uint8_t kMajor = 1;
constexpr std::uint8_t kMinor = 5;
constexpr std::size_t kMaxSegments = 4;
constexpr std::size_t kMaxMessageBytes = 64 * 1024;
constexpr std::size_t kMaxReasonBytes = 512;
constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{1} << 40;
constexpr std::uint64_t kPayloadAlignment = 64;  // of a frame's payload in a bundle
constexpr std::size_t kMaxBundleFrames = (kMaxMessageBytes - 72) / 112;

enum class Type : std::uint16_t {
  kFrame = 1,         // sender -> receiver: a slot is filled; the header of one frame (the commit)
  kTicket = 2,        // receiver -> sender: send me these tokens of this request
  kGrant = 3,         // receiver -> sender: these slots are yours until you commit or release them
  kRelease = 4,       // sender -> receiver: slots given back unused
  kRecall = 5,        // receiver -> sender: release what you do not use
  kDone = 6,          // receiver -> sender: all routes of this link for this request are verified and in the pool
  kAbort = 7,         // either: the request is given up
  kWant = 8,          // sender -> receiver: has frames to send and gave its slots back
  kHeartbeat = 9,     // either
  kBye = 10,          // either: orderly end of the link
  kBoundTicket = 11,  // receiver -> sender: a ticket for a request of one content
  kBundle = 12,       // sender -> receiver: a slot is filled with the payloads of several frames
  kHostOnly = 13,     // sender -> receiver: cannot reach device memory of the peer: grant slots in host memory
};

const char* name(Type type);  // as docs/wire-format.md spells it: "frame", "want"

using RequestId = std::array<std::uint8_t, 16>;

// First 48 bytes of every message.
struct Prelude {
  Type type = Type::kHeartbeat;
  std::uint32_t length = 0;    // of the whole message, MAC included
  std::uint64_t sequence = 0;  // per direction of a link, from 0, without gaps
  RequestId request{};         // zeros where the message is of no request
  std::uint64_t epoch = 0;     // the receiver's number of this attempt; 0 where there is none
};

// Body of kFrame: which part of the request's cache the slot's payload is.
struct Frame {
  std::uint16_t group = 0;       // cache group
  std::uint16_t segments = 0;    // bit i: segment i of the layer's spec is in the payload, in rising order
  std::uint32_t layer = 0;       // global
  std::uint32_t head_start = 0;  // global, half-open
  std::uint32_t head_stop = 0;
  std::uint64_t token_start = 0;  // of the sequence, half-open
  std::uint64_t token_stop = 0;
  std::array<std::uint8_t, kMaxSegments> dtypes{};  // DType per segment; 0 where absent
  std::uint8_t scale_encoding = 0;  // bit i: segment i is scaled by a part of this payload (see scales_of)
  std::uint8_t codec = 0;           // 0: plain
  std::array<std::uint32_t, kMaxSegments> channels{};  // per segment; 0 where absent
  std::uint32_t slot = 0;
  std::uint32_t generation = 0;
  std::uint64_t payload_length = 0;
  std::uint64_t checksum = 0;   // of the payload (remap/checksum.h), seeded with checksum_seed()
  std::uint64_t saturated = 0;  // elements clamped while packing
};

// One frame of a bundle. The frame's own slot and generation are the bundle's.
struct Record {
  RequestId request{};
  std::uint64_t epoch = 0;
  Frame frame;
  std::uint64_t payload_offset = 0;  // in the slot, a multiple of kPayloadAlignment
};

// Body of kBundle: frames of any requests, in the order of their payloads, which do not overlap.
struct Bundle {
  std::uint32_t slot = 0;
  std::uint32_t generation = 0;
  std::vector<Record> records;
};

// Where the parts of a frame's payload are. Each part starts at a multiple of 8 bytes from the payload's start and is
// followed by zeros up to the next multiple of 8, so `total` (the frame's payload_length) is one as well.
struct PayloadLayout {
  std::array<std::uint64_t, kMaxSegments> offsets{};  // 0 where the segment is absent
  std::array<std::uint64_t, kMaxSegments> bytes{};    // without the zeros after it; 0 where the segment is absent
  std::uint64_t total = 0;                            // above kMaxPayloadBytes where the frame asks for more than that
};
// From segments, heads, tokens, channels and dtypes of `frame`, whose intervals are not reversed.
PayloadLayout payload_layout(const Frame& frame);

// Which segments hold the scales of a frame's scaled segments: item i is the segment that scales segment i, or -1. The
// last n present segments are scales where scale_encoding has n bits, in the order of the segments that they scale.
// Meaningful for a frame that decode() has accepted.
std::array<int, kMaxSegments> scales_of(std::uint16_t segments, std::uint8_t scale_encoding);

struct TokenRange {
  std::uint64_t start = 0;
  std::uint64_t stop = 0;
};

// Digest of all that a request's KV depends on. Not all zeros.
using Content = std::array<std::uint8_t, 16>;

// Body of kTicket; with a content, of kBoundTicket. Block ids stay with the receiver: a sender never needs to name
// them.
struct Ticket {
  std::uint32_t lease_ms = 0;
  std::optional<Content> content;
  std::vector<TokenRange> groups;  // wanted tokens per cache group; empty ranges are allowed
};

struct SlotGrant {
  std::uint32_t slot = 0;
  std::uint32_t generation = 0;  // rises whenever the slot's memory is replaced
  std::uint64_t address = 0;
  std::uint64_t bytes = 0;
  std::vector<std::uint8_t> rkey;  // empty where this link has seen (slot, generation) before
};
struct Grant {
  std::vector<SlotGrant> slots;
};

struct SlotName {
  std::uint32_t slot = 0;
  std::uint32_t generation = 0;
};
struct Release {  // also the body of kRecall, where an empty list recalls all
  std::vector<SlotName> slots;
};

struct Done {
  std::uint64_t frames = 0;
  std::uint64_t payload_bytes = 0;
};

struct Abort {
  Code code = Code::kAborted;
  std::string reason;  // UTF-8, at most kMaxReasonBytes; encode() cuts a longer one and replaces malformed bytes by '?'
};

struct Heartbeat {
  std::uint64_t clock_ns = 0;  // sender's CLOCK_MONOTONIC
};

// Each appends nothing and overwrites `out` with one whole message. `prelude.length` is ignored and computed, and so is
// `prelude.type` where the body says it; a Release is a kRecall where the prelude says so, a Ticket with a content is a
// kBoundTicket. Values are not checked: the
// other side's decode() is the judge. A message must fit kMaxMessageBytes, so long lists go in several.
void encode(const Prelude& prelude, const Frame& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Bundle& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Ticket& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Grant& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Release& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Done& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Abort& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const Heartbeat& body, const SipKey& key, std::vector<std::uint8_t>& out);
void encode(const Prelude& prelude, const SipKey& key, std::vector<std::uint8_t>& out);  // kWant, kBye, kHostOnly

// Checks magic, versions, reserved fields, type, length and MAC, in that order, then whether the message names a
// request where its type wants one. The body decoders may run after that. The caller checks the sequence number.
Status open(const std::uint8_t* data, std::size_t size, const SipKey& key, Prelude* prelude);
// Each checks every length, count, interval and code of the body. `data` and `size` are the whole message.
Status decode(const std::uint8_t* data, std::size_t size, Frame* body);
Status decode(const std::uint8_t* data, std::size_t size, Bundle* body);
Status decode(const std::uint8_t* data, std::size_t size, Ticket* body);
Status decode(const std::uint8_t* data, std::size_t size, Grant* body);
Status decode(const std::uint8_t* data, std::size_t size, Release* body);
Status decode(const std::uint8_t* data, std::size_t size, Done* body);
Status decode(const std::uint8_t* data, std::size_t size, Abort* body);
Status decode(const std::uint8_t* data, std::size_t size, Heartbeat* body);

// Seed of a frame's payload checksum, from what the frame is (request, epoch, layer, heads, tokens, segments), so that
// a payload that belongs to another frame is seen.
std::uint64_t checksum_seed(const RequestId& request, std::uint64_t epoch, const Frame& frame);

}  // namespace hetkv::wire
