#include <algorithm>
#include <cstring>

#include "wire/bytes.h"
#include "wire/layout.h"
#include "wire/message.h"
#include "wire/utf8.h"

namespace hetkv::wire {
namespace {

Writer begin(const Prelude& prelude, Type type, std::vector<std::uint8_t>& out) {
  out.clear();
  PreludeBytes raw{};
  raw.magic = kMagic;
  raw.major = kMajor;
  raw.minor = kMinor;
  raw.type = static_cast<std::uint16_t>(type);
  raw.sequence = prelude.sequence;
  std::copy(prelude.request.begin(), prelude.request.end(), raw.request);
  raw.epoch = prelude.epoch;
  Writer writer(&out);
  writer.put(raw);
  return writer;
}

// Fills in the length and appends the MAC.
void finish(const SipKey& key, std::vector<std::uint8_t>& out) {
  const auto length = static_cast<std::uint32_t>(out.size() + kMacBytes);
  std::memcpy(out.data() + offsetof(PreludeBytes, length), &length, sizeof(length));
  Writer(&out).put(siphash24(key, out.data(), out.size()));
}

FrameIdentityBytes identity_bytes(const Frame& body) {
  FrameIdentityBytes raw{};
  raw.group = body.group;
  raw.segments = body.segments;
  raw.layer = body.layer;
  raw.head_start = body.head_start;
  raw.head_stop = body.head_stop;
  raw.token_start = body.token_start;
  raw.token_stop = body.token_stop;
  std::copy(body.dtypes.begin(), body.dtypes.end(), raw.dtypes);
  raw.scale_encoding = body.scale_encoding;
  raw.codec = body.codec;
  std::copy(body.channels.begin(), body.channels.end(), raw.channels);
  return raw;
}

IdentityBytes identity_bytes(const RequestId& request, std::uint64_t epoch, const Frame& frame) {
  IdentityBytes raw{};
  std::copy(request.begin(), request.end(), raw.request);
  raw.epoch = epoch;
  raw.frame = identity_bytes(frame);
  return raw;
}

}  // namespace

void encode(const Prelude& prelude, const Frame& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  begin(prelude, Type::kFrame, out)
      .put(FrameBytes{identity_bytes(body), body.slot, body.generation, body.payload_length, body.checksum,
                      body.saturated});
  finish(key, out);
}

void encode(const Prelude& prelude, const Bundle& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  Writer writer = begin(prelude, Type::kBundle, out);
  out.reserve(kMinMessageBytes + sizeof(BundleBytes) + body.records.size() * sizeof(RecordBytes));
  writer.put(BundleBytes{body.slot, body.generation, static_cast<std::uint32_t>(body.records.size()), 0});
  for (const Record& record : body.records) {
    const Frame& frame = record.frame;
    writer.put(RecordBytes{identity_bytes(record.request, record.epoch, frame), record.payload_offset,
                           frame.payload_length, frame.checksum, frame.saturated});
  }
  finish(key, out);
}

void encode(const Prelude& prelude, const Ticket& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  Writer writer = begin(prelude, body.content ? Type::kBoundTicket : Type::kTicket, out);
  writer.put(TicketBytes{body.lease_ms, static_cast<std::uint32_t>(body.groups.size())});
  if (body.content) writer.put(body.content->data(), body.content->size());
  for (const TokenRange& range : body.groups) writer.put(RangeBytes{range.start, range.stop});
  finish(key, out);
}

void encode(const Prelude& prelude, const Grant& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  Writer writer = begin(prelude, Type::kGrant, out);
  writer.put(ListBytes{static_cast<std::uint32_t>(body.slots.size()), 0});
  for (const SlotGrant& slot : body.slots) {
    writer.put(SlotGrantBytes{slot.slot, slot.generation, slot.address, slot.bytes,
                              static_cast<std::uint32_t>(slot.rkey.size()), 0});
    writer.put(slot.rkey.data(), slot.rkey.size());
    writer.pad();
  }
  finish(key, out);
}

void encode(const Prelude& prelude, const Release& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  Writer writer = begin(prelude, prelude.type == Type::kRecall ? Type::kRecall : Type::kRelease, out);
  writer.put(ListBytes{static_cast<std::uint32_t>(body.slots.size()), 0});
  for (const SlotName& slot : body.slots) writer.put(SlotNameBytes{slot.slot, slot.generation});
  finish(key, out);
}

void encode(const Prelude& prelude, const Done& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  begin(prelude, Type::kDone, out).put(DoneBytes{body.frames, body.payload_bytes});
  finish(key, out);
}

void encode(const Prelude& prelude, const Abort& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  Writer writer = begin(prelude, Type::kAbort, out);
  const std::string reason = utf8_prefix(body.reason, kMaxReasonBytes);
  writer.put(AbortBytes{static_cast<std::uint32_t>(body.code), static_cast<std::uint32_t>(reason.size())});
  writer.put(reason.data(), reason.size());
  writer.pad();
  finish(key, out);
}

void encode(const Prelude& prelude, const Heartbeat& body, const SipKey& key, std::vector<std::uint8_t>& out) {
  begin(prelude, Type::kHeartbeat, out).put(HeartbeatBytes{body.clock_ns});
  finish(key, out);
}

void encode(const Prelude& prelude, const SipKey& key, std::vector<std::uint8_t>& out) {
  begin(prelude, prelude.type, out);
  finish(key, out);
}

std::uint64_t checksum_seed(const RequestId& request, std::uint64_t epoch, const Frame& frame) {
  constexpr SipKey kPublicKey{'h', 'e', 't', 'k', 'v', '.', 'c', 'h', 'e', 'c', 'k', 's', 'u', 'm', '.', '1'};
  const IdentityBytes identity = identity_bytes(request, epoch, frame);
  return siphash24(kPublicKey, &identity, sizeof(identity));
}

}  // namespace hetkv::wire
