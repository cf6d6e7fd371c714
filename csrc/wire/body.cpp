#include "wire/body.h"

#include "wire/layout.h"

namespace hetkv::wire {

using std::to_string;

Status malformed(std::string text) {
  return Status::error(Code::kMalformed, std::move(text));
}

Status unknown_code(const std::string& what, std::uint64_t code, std::uint8_t minor) {
  return Status::error(Code::kUnsupported, what + " " + to_string(code) + " is not known to version " +
                                               to_string(kMajor) + "." + to_string(kMinor) + " (message is " +
                                               to_string(kMajor) + "." + to_string(minor) + ")");
}

Status check_length(Type type, std::size_t length) {
  const BodySize body = body_size(type);
  const std::size_t least = kMinMessageBytes + body.bytes;
  if (body.fixed ? length == least : length >= least) return {};
  return malformed("length of a " + std::string(name(type)) + " is " + to_string(length) + "; must be " +
                   (body.fixed ? "" : "at least ") + to_string(least));
}

Status check_zeros(const std::uint8_t* bytes, std::size_t count, const std::string& what) {
  for (std::size_t i = 0; i < count; ++i) {
    if (bytes[i] != 0) return malformed(what + " is " + to_string(bytes[i]) + ", not 0");
  }
  return {};
}

Body find_body(const std::uint8_t* data, std::size_t size, Type* type) {
  const Reader none(nullptr, 0);
  if (size < kMinMessageBytes) {
    return {malformed("message of " + to_string(size) + " bytes is shorter than " + to_string(kMinMessageBytes)), none};
  }
  PreludeBytes prelude;
  std::memcpy(&prelude, data, sizeof(prelude));
  if (*type == Type::kRelease && prelude.type == static_cast<std::uint16_t>(Type::kRecall)) *type = Type::kRecall;
  if (*type == Type::kTicket && prelude.type == static_cast<std::uint16_t>(Type::kBoundTicket)) {
    *type = Type::kBoundTicket;
  }
  if (prelude.type != static_cast<std::uint16_t>(*type)) {
    return {malformed("type is " + to_string(prelude.type) + ", not " + to_string(static_cast<std::uint16_t>(*type)) +
                      " (" + name(*type) + ")"),
            none};
  }
  if (Status status = check_length(*type, size); !status.ok()) return {std::move(status), none};
  return {{}, Reader(data + sizeof(prelude), size - kMinMessageBytes), prelude.minor};
}

}  // namespace hetkv::wire
