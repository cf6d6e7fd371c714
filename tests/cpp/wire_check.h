// One message through the codec, for the fuzzers: what is accepted encodes to the same bytes again.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "wire/message.h"

namespace hetkv {

using Bytes = std::vector<std::uint8_t>;

inline wire::SipKey fuzz_key() {
  wire::SipKey out{};
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::uint8_t>(i);
  return out;
}

inline void repair_mac(Bytes* message) {
  if (message->size() < 8) return;
  const std::size_t covered = message->size() - 8;
  const std::uint64_t mac = wire::siphash24(fuzz_key(), message->data(), covered);
  std::memcpy(message->data() + covered, &mac, sizeof(mac));
}

template <class Body>
Status decode_and_encode(const std::uint8_t* data, std::size_t size, const wire::Prelude* prelude) {
  Body body;
  Status status = wire::decode(data, size, &body);
  if (!status.ok() || prelude == nullptr || data[5] != wire::kMinor) return status;
  Bytes again;
  wire::encode(*prelude, body, fuzz_key(), again);
  if (again.size() != size || std::memcmp(again.data(), data, size) != 0) {
    std::fprintf(stderr, "a valid %s of %zu bytes has a second encoding\n", wire::name(prelude->type), size);
    std::abort();
  }
  return status;
}

// `prelude` is null where the message was not opened.
inline Status check_body(const std::uint8_t* data, std::size_t size, wire::Type type, const wire::Prelude* prelude) {
  switch (type) {
    case wire::Type::kFrame:
      return decode_and_encode<wire::Frame>(data, size, prelude);
    case wire::Type::kBundle:
      return decode_and_encode<wire::Bundle>(data, size, prelude);
    case wire::Type::kTicket:
    case wire::Type::kBoundTicket:
      return decode_and_encode<wire::Ticket>(data, size, prelude);
    case wire::Type::kGrant:
      return decode_and_encode<wire::Grant>(data, size, prelude);
    case wire::Type::kRelease:
    case wire::Type::kRecall:
      return decode_and_encode<wire::Release>(data, size, prelude);
    case wire::Type::kDone:
      return decode_and_encode<wire::Done>(data, size, prelude);
    case wire::Type::kAbort:
      return decode_and_encode<wire::Abort>(data, size, prelude);
    case wire::Type::kHeartbeat:
      return decode_and_encode<wire::Heartbeat>(data, size, prelude);
    case wire::Type::kWant:
    case wire::Type::kHostOnly:
    case wire::Type::kBye:
      break;
  }
  return {};
}

}  // namespace hetkv
