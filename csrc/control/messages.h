// Messages of the control channel as MessagePack (docs/control-channel.md, section Messages).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "control/model.h"

namespace hetkv::control {

using Bytes = std::vector<std::uint8_t>;

enum class MessageKind : std::uint8_t { kDescription, kAccept, kRefusal, kStreaming, kReady, kBye };

struct Message {
  MessageKind kind = MessageKind::kBye;
  Description description;               // kDescription, checked
  std::string field, mine, theirs, why;  // kRefusal, as the peer sees them
  bool unix_sockets = false;             // kStreaming: of what kind,
  std::int64_t count = 0;                // and how many
  std::string reason;                    // kBye
};

Bytes encode(const Description& description);
Bytes encode_accept();
Bytes encode_refusal(const std::string& field, const std::string& mine, const std::string& theirs,
                     const std::string& why);
Bytes encode_streaming(bool unix_sockets, std::int64_t count);
Bytes encode_ready();
Bytes encode_bye(const std::string& reason);

// kMalformed: an unknown type, an unknown or missing field, a value that cannot be.
Status decode(const std::uint8_t* data, std::size_t size, Message* out);

}  // namespace hetkv::control
