// What open() and the body decoders share: finding the body, and the texts of errors. Not for users of the codec.
#pragma once

#include <cstdint>
#include <string>

#include "wire/bytes.h"
#include "wire/message.h"

namespace hetkv::wire {

Status malformed(std::string text);
// "`what` `code` is not known to version 1.x (message is 1.y)": a code of a later minor version.
Status unknown_code(const std::string& what, std::uint64_t code, std::uint8_t minor);

Status check_length(Type type, std::size_t length);
Status check_zeros(const std::uint8_t* bytes, std::size_t count, const std::string& what);

// The body of a message of type `*type` (a kRecall where kRelease is asked for, a
// kBoundTicket where kTicket is; `*type` then says so) and its minor
// version. open() has checked all this already; a decoder called without it stays safe.
struct Body {
  Status status;
  Reader reader;
  std::uint8_t minor = 0;
};
Body find_body(const std::uint8_t* data, std::size_t size, Type* type);

}  // namespace hetkv::wire
