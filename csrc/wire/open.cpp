#include <algorithm>
#include <cstring>

#include "wire/body.h"
#include "wire/layout.h"
#include "wire/message.h"

namespace hetkv::wire {
namespace {

using std::to_string;

bool known(std::uint16_t type) {
  return type >= static_cast<std::uint16_t>(Type::kFrame) && type <= static_cast<std::uint16_t>(Type::kHostOnly);
}

bool of_request(Type type) {
  return type == Type::kFrame || type == Type::kTicket || type == Type::kBoundTicket || type == Type::kDone ||
         type == Type::kAbort;
}

std::string hex(const std::uint8_t* data, std::size_t bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (std::size_t i = 0; i < bytes; ++i) {
    text += kDigits[data[i] >> 4];
    text += kDigits[data[i] & 15];
  }
  return text;
}

}  // namespace

const char* name(Type type) {
  constexpr const char* kNames[] = {"frame", "ticket",    "grant", "release",      "recall", "done",     "abort",
                                    "want",  "heartbeat", "bye",   "bound_ticket", "bundle", "host_only"};
  const auto code = static_cast<std::uint16_t>(type);
  return known(code) ? kNames[code - 1] : "unknown";
}

Status open(const std::uint8_t* data, std::size_t size, const SipKey& key, Prelude* prelude) {
  if (size < kMinMessageBytes) {
    return malformed("message of " + to_string(size) + " bytes is shorter than " + to_string(kMinMessageBytes));
  }
  PreludeBytes raw;
  std::memcpy(&raw, data, sizeof(raw));
  if (raw.magic != kMagic) return malformed("magic is " + hex(data, 4) + ", not 484b5631 (HKV1)");
  if (raw.major != kMajor) {
    return Status::error(Code::kUnsupported,
                         "major version is " + to_string(raw.major) + "; this side reads " + to_string(kMajor));
  }
  if (raw.reserved != 0) return malformed("reserved field at byte 12 is " + to_string(raw.reserved) + ", not 0");
  if (!known(raw.type)) return unknown_code("type", raw.type, raw.minor);
  const auto type = static_cast<Type>(raw.type);
  if (raw.length > kMaxMessageBytes) {
    return malformed("length " + to_string(raw.length) + " is over the limit of " + to_string(kMaxMessageBytes));
  }
  if (raw.length != size) {
    return malformed("length is " + to_string(raw.length) + ", but " + to_string(size) + " bytes arrived");
  }
  if (raw.length % 8 != 0) return malformed("length " + to_string(raw.length) + " is not a multiple of 8");
  if (Status status = check_length(type, size); !status.ok()) return status;

  std::uint64_t mac;
  std::memcpy(&mac, data + size - kMacBytes, sizeof(mac));
  if (mac != siphash24(key, data, size - kMacBytes)) {
    return Status::error(Code::kBadMac, std::string("MAC of a ") + name(type) + " does not match its bytes");
  }

  const bool named = std::any_of(raw.request, raw.request + sizeof(raw.request), [](std::uint8_t b) { return b != 0; });
  if (of_request(type) && !named) return malformed(std::string("request_id of a ") + name(type) + " is all zeros");
  if (!of_request(type) && named) {
    return malformed(std::string("request_id of a ") + name(type) + " is " + hex(raw.request, sizeof(raw.request)) +
                     ", not zeros");
  }
  if (!of_request(type) && raw.epoch != 0) {
    return malformed(std::string("epoch of a ") + name(type) + " is " + to_string(raw.epoch) + ", not 0");
  }
  prelude->type = type;
  prelude->length = raw.length;
  prelude->sequence = raw.sequence;
  std::copy(raw.request, raw.request + sizeof(raw.request), prelude->request.begin());
  prelude->epoch = raw.epoch;
  return {};
}

}  // namespace hetkv::wire
