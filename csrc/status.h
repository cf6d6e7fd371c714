// Results inside csrc/: a code and, where it helps, one line of detail. bindings/ turns them into typed exceptions.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace hetkv {

enum class Code : std::uint8_t {
  kOk = 0,
  kInvalid = 1,        // InputError: the caller's value is wrong
  kMalformed = 2,      // WireError: bytes that are not a valid message
  kUnsupported = 3,    // WireError: valid, but a version or code that this build does not know
  kBadMac = 4,         // AuthenticationError: the MAC or the sequence number is wrong
  kChecksum = 5,       // ChecksumError: the payload is not what the sender packed
  kProtocol = 6,       // ProtocolError: a valid message that this state does not allow
  kPeerLost = 7,       // PeerLostError: the peer is gone or silent
  kLeaseExpired = 8,   // LeaseExpiredError
  kAborted = 9,        // AbortedError: one side gave the request up
  kTransport = 10,     // TransportError: UCX reported an error
  kClosed = 11,        // ClosedError: the sender or receiver was closed
  kContent = 12,       // ContentError: the two sides of a request are not of one content
  kDevice = 13,        // DeviceError: a GPU or its driver rejected; on the wire it is kTransport
  kPoolChecksum = 14,  // PoolChecksumError: the pool does not hold what was unpacked; on the wire it is kChecksum
};

struct [[nodiscard]] Status {
  Code code = Code::kOk;
  std::string detail;

  bool ok() const { return code == Code::kOk; }
  static Status error(Code c, std::string text) { return Status{c, std::move(text)}; }
};

}  // namespace hetkv
