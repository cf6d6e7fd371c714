// The handshake of docs/control-channel.md: hellos, proofs, descriptions, verdicts, streams. Both sides of it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "control/agreement.h"
#include "control/channel.h"
#include "control/keys.h"
#include "wire/siphash.h"

namespace hetkv::control {

constexpr std::uint16_t kMajor = 2, kMinor = 4;
constexpr std::size_t kHelloBytes = 88, kMagicBytes = 8, kMostStreams = 8;
constexpr char kMagic[] = "hetkvctl", kStreamMagic[] = "hetkvdat";

struct LinkKeys {
  Hash control_send{}, control_receive{};
  Hash call_send{}, call_receive{};
  wire::SipKey data_send{}, data_receive{};
  std::vector<std::pair<wire::SipKey, wire::SipKey>> streams;  // send, receive
  std::uint64_t number = 0;
  std::uint8_t minor = 0;
};

// A peer that fits, and all that the engine's link needs.
struct Linked {
  Channel channel;
  Records records;
  LinkKeys keys;
  Description theirs;
  Agreement agreement;
  std::vector<int> streams;  // descriptors, owned by whoever takes them out
  bool unix_streams = false;
};

using Hello = std::vector<std::uint8_t>;

// What a side is in every handshake.
struct Side {
  std::vector<std::uint8_t> secret;
  Description description;
  std::int64_t timeout_ms = 10000;  // of each step
};

// Where a listener's streams wait for the handshakes that they belong to. Thread safe.
class Desk {
 public:
  void expect(const LinkKeys& keys);
  // A call whose magic has been read: checked, answered, kept.
  Result accept(Channel& channel, const Hello& sent, std::int64_t timeout_ms);
  // The connection's streams, once all `count` are there.
  Result collect(const LinkKeys& keys, std::size_t count, std::int64_t timeout_ms, std::vector<int>* out);
  void forget(const LinkKeys& keys);

 private:
  struct Awaited {
    LinkKeys keys;
    std::map<std::size_t, int> descriptors;
  };
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::uint64_t, Awaited> awaited_;  // by the number of the link
};

Result connect(const std::string& address, const Side& side, Linked* out);
// Serves what has connected: a handshake fills `out`, a stream goes to the desk and sets `is_stream`.
Result serve(Channel channel, const Side& side, Desk& desk, Linked* out, bool* is_stream);

}  // namespace hetkv::control
