#include <algorithm>
#include <cstring>

#include "wire/body.h"
#include "wire/layout.h"
#include "wire/message.h"
#include "wire/utf8.h"

namespace hetkv::wire {
namespace {

using std::to_string;

// Slots are named once in a list: a second grant or release of one of them would count it twice.
Status check_distinct(std::vector<std::uint32_t> slots, const std::string& type) {
  std::sort(slots.begin(), slots.end());
  const auto twice = std::adjacent_find(slots.begin(), slots.end());
  if (twice == slots.end()) return {};
  return malformed(type + ": slot " + to_string(*twice) + " is named twice");
}

}  // namespace

Status decode(const std::uint8_t* data, std::size_t size, Ticket* body) {
  Type type = Type::kTicket;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  const std::string what = name(type);
  TicketBytes raw{};
  if (!found.reader.take(&raw)) return malformed(what + ": body is too short");
  Ticket ticket;
  ticket.lease_ms = raw.lease_ms;
  if (type == Type::kBoundTicket) {
    if (!found.reader.take(&ticket.content.emplace())) return malformed(what + ": body is too short");
    if (*ticket.content == Content{}) return malformed(what + ": content is all zeros");
  }
  if (raw.num_groups == 0) return malformed(what + ": num_groups is 0");
  if (found.reader.left() != std::uint64_t{raw.num_groups} * sizeof(RangeBytes)) {
    return malformed(what + ": num_groups is " + to_string(raw.num_groups) + ", but " + to_string(found.reader.left()) +
                     " bytes of ranges follow");
  }
  ticket.groups.reserve(raw.num_groups);
  for (RangeBytes range{}; found.reader.take(&range);) {
    if (range.start > range.stop) {
      return malformed(what + ": token interval [" + to_string(range.start) + ", " + to_string(range.stop) +
                       ") of group " + to_string(ticket.groups.size()) + " is reversed");
    }
    ticket.groups.push_back({range.start, range.stop});
  }
  *body = std::move(ticket);
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Grant* body) {
  Type type = Type::kGrant;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  ListBytes raw{};
  if (!found.reader.take(&raw)) return malformed("grant: body is too short");
  if (raw.reserved != 0) return malformed("grant: reserved is " + to_string(raw.reserved) + ", not 0");
  if (raw.num_slots == 0) return malformed("grant: num_slots is 0");
  if (raw.num_slots > found.reader.left() / sizeof(SlotGrantBytes)) {
    return malformed("grant: num_slots is " + to_string(raw.num_slots) + ", but " + to_string(found.reader.left()) +
                     " bytes of slots follow");
  }
  Grant grant;
  std::vector<std::uint32_t> slots;
  grant.slots.reserve(raw.num_slots);
  slots.reserve(raw.num_slots);
  for (std::uint32_t i = 0; i < raw.num_slots; ++i) {
    const std::string where = "grant: slots[" + to_string(i) + "]";
    SlotGrantBytes slot{};
    if (!found.reader.take(&slot))
      return malformed(where + " is cut short: " + to_string(found.reader.left()) + " bytes are left");
    if (slot.reserved != 0) return malformed(where + ".reserved is " + to_string(slot.reserved) + ", not 0");
    if (slot.bytes == 0) return malformed(where + ".bytes is 0");
    if (slot.address > UINT64_MAX - slot.bytes) {
      return malformed(where + ": address " + to_string(slot.address) + " plus " + to_string(slot.bytes) +
                       " bytes passes the end of memory");
    }
    if (slot.rkey_length > found.reader.left()) {
      return malformed(where + ".rkey_length is " + to_string(slot.rkey_length) + ", but " +
                       to_string(found.reader.left()) + " bytes are left");
    }
    const std::uint8_t* rkey = found.reader.take(padded(slot.rkey_length));
    if (rkey == nullptr) return malformed(where + ".rkey is not padded to 8 bytes");
    const std::size_t pad = padded(slot.rkey_length) - slot.rkey_length;
    if (Status status = check_zeros(rkey + slot.rkey_length, pad, where + ": padding"); !status.ok()) return status;
    slots.push_back(slot.slot);
    grant.slots.push_back({slot.slot, slot.generation, slot.address, slot.bytes, {rkey, rkey + slot.rkey_length}});
  }
  if (found.reader.left() != 0)
    return malformed("grant: " + to_string(found.reader.left()) + " bytes follow the last slot");
  if (Status status = check_distinct(std::move(slots), "grant"); !status.ok()) return status;
  *body = std::move(grant);
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Release* body) {
  Type type = Type::kRelease;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  const std::string what = name(type);
  ListBytes raw{};
  if (!found.reader.take(&raw)) return malformed(what + ": body is too short");
  if (raw.reserved != 0) return malformed(what + ": reserved is " + to_string(raw.reserved) + ", not 0");
  if (found.reader.left() != std::uint64_t{raw.num_slots} * sizeof(SlotNameBytes)) {
    return malformed(what + ": num_slots is " + to_string(raw.num_slots) + ", but " + to_string(found.reader.left()) +
                     " bytes of slots follow");
  }
  Release release;
  std::vector<std::uint32_t> slots;
  for (SlotNameBytes slot{}; found.reader.take(&slot);) {
    slots.push_back(slot.slot);
    release.slots.push_back({slot.slot, slot.generation});
  }
  if (Status status = check_distinct(std::move(slots), what); !status.ok()) return status;
  *body = std::move(release);
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Done* body) {
  Type type = Type::kDone;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  DoneBytes raw{};
  if (!found.reader.take(&raw)) return malformed("done: body is too short");
  *body = {raw.frames, raw.payload_bytes};
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Abort* body) {
  Type type = Type::kAbort;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  AbortBytes raw{};
  if (!found.reader.take(&raw)) return malformed("abort: body is too short");
  if (raw.code == 0) return malformed("abort: code is 0, which is no error");
  if (raw.code > static_cast<std::uint32_t>(Code::kContent)) {
    return unknown_code("abort: code", raw.code, found.minor);
  }
  if (raw.reason_length > kMaxReasonBytes) {
    return malformed("abort: reason_length " + to_string(raw.reason_length) + " is over the limit of " +
                     to_string(kMaxReasonBytes));
  }
  if (found.reader.left() != padded(raw.reason_length)) {
    return malformed("abort: reason_length is " + to_string(raw.reason_length) + ", but " +
                     to_string(found.reader.left()) + " bytes of reason follow");
  }
  const std::size_t length = found.reader.left();
  const std::uint8_t* bytes = found.reader.take(length);
  if (Status status = check_zeros(bytes + raw.reason_length, length - raw.reason_length, "abort: padding");
      !status.ok()) {
    return status;
  }
  std::string reason(reinterpret_cast<const char*>(bytes), raw.reason_length);
  if (const std::size_t at = utf8_error(reason); at != reason.size()) {
    return malformed("abort: reason is not UTF-8 at its byte " + to_string(at));
  }
  *body = {static_cast<Code>(raw.code), std::move(reason)};
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Heartbeat* body) {
  Type type = Type::kHeartbeat;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  HeartbeatBytes raw{};
  if (!found.reader.take(&raw)) return malformed("heartbeat: body is too short");
  *body = {raw.clock_ns};
  return {};
}

}  // namespace hetkv::wire
