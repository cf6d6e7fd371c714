#include "control/handshake.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "hetkv.h"

namespace hetkv::control {
namespace {

constexpr std::size_t kProofBytes = 36, kCallBytes = 64, kTagBytes = 32;
constexpr std::uint8_t kProve = 1, kAlert = 2;
constexpr char kWrongSecret[] = "authentication failed: the two sides do not have the same secret";

template <typename T>
void put(Hello& out, std::size_t at, T value) {
  std::memcpy(out.data() + at, &value, sizeof value);
}

template <typename T>
T get(const std::uint8_t* data, std::size_t at) {
  T value{};
  std::memcpy(&value, data + at, sizeof value);
  return value;
}

Hello make_hello(Role role) {
  Hello out(kHelloBytes);
  std::memcpy(out.data(), kMagic, kMagicBytes);
  put(out, 8, kMajor);
  put(out, 10, kMinor);
  put(out, 12, static_cast<std::uint32_t>(kHelloBytes));
  out[16] = static_cast<std::uint8_t>(role);
  fill_random(out.data() + 24, 32);
  const std::string version = std::string(hetkv_version()).substr(0, 32);
  std::memcpy(out.data() + 56, version.data(), version.size());
  return out;
}

// The peer's hello, of which the magic has been read.
Result read_hello(Channel& channel, std::int64_t deadline, Hello* out) {
  const std::string& peer = channel.peer();
  if (std::memcmp(out->data(), kMagic, kMagicBytes) != 0) {
    return failure(HETKV_HANDSHAKE, peer + ": not a hetkv control channel");
  }
  out->resize(kHelloBytes);
  Result result = channel.read(out->data() + kMagicBytes, 16 - kMagicBytes, deadline, "hello");
  if (!result.ok()) return result;
  const auto major = get<std::uint16_t>(out->data(), 8), minor = get<std::uint16_t>(out->data(), 10);
  if (major != kMajor) {
    return failure(HETKV_VERSION_MISMATCH, peer + ": the peer speaks control protocol " + std::to_string(major) + "." +
                                               std::to_string(minor) + ", this side " + std::to_string(kMajor) + "." +
                                               std::to_string(kMinor));
  }
  if (get<std::uint32_t>(out->data(), 12) != kHelloBytes)
    return failure(HETKV_HANDSHAKE, peer + ": hello of a wrong length");
  result = channel.read(out->data() + 16, kHelloBytes - 16, deadline, "hello");
  if (!result.ok()) return result;
  if ((*out)[16] != 1 && (*out)[16] != 2) return failure(HETKV_HANDSHAKE, peer + ": hello with an unknown role");
  if (std::any_of(out->begin() + 17, out->begin() + 24, [](std::uint8_t byte) { return byte != 0; })) {
    return failure(HETKV_HANDSHAKE, peer + ": hello with reserved bytes that are not zero");
  }
  return {};
}

Result prove(Channel& channel, const Hash& proof, std::int64_t deadline) {
  std::uint8_t record[kProofBytes] = {kProve};
  std::memcpy(record + 4, proof.data(), proof.size());
  return channel.write(record, sizeof record, deadline);
}

Result verify(Channel& channel, const Hash& expected, std::int64_t deadline) {
  std::uint8_t record[kProofBytes];
  Result result = channel.read(record, sizeof record, deadline, "proof");
  if (!result.ok()) return result;
  const bool padded = record[1] == 0 && record[2] == 0 && record[3] == 0;
  if (record[0] == kProve && padded && equal(expected, record + 4)) return {};
  if (record[0] == kProve) {
    const std::uint8_t alert[kProofBytes] = {kAlert};
    (void)channel.write(alert, sizeof alert, deadline);
  }
  return failure(HETKV_AUTHENTICATION, channel.peer() + ": " + kWrongSecret);
}

wire::SipKey half(const Hash& key) {
  wire::SipKey out{};
  std::memcpy(&out, key.data(), sizeof out);
  return out;
}

LinkKeys keys_of(const Schedule& schedule, Role role, std::uint16_t minor) {
  const std::string mine = name_of(role), theirs = name_of(other(role));
  LinkKeys out;
  out.control_send = schedule.key("control " + mine);
  out.control_receive = schedule.key("control " + theirs);
  out.call_send = schedule.key("call " + mine);
  out.call_receive = schedule.key("call " + theirs);
  out.data_send = half(schedule.key("data " + mine));
  out.data_receive = half(schedule.key("data " + theirs));
  for (std::size_t at = 0; at < kMostStreams; ++at) {
    const std::string label = "stream " + std::to_string(at) + " ";
    out.streams.emplace_back(half(schedule.key(label + mine)), half(schedule.key(label + theirs)));
  }
  out.number = get<std::uint64_t>(schedule.key("link").data(), 0);
  out.minor = static_cast<std::uint8_t>(std::min(minor, kMinor));
  return out;
}

// From the hellos to the keys. `theirs` has the peer's magic.
Result authenticate(Channel& channel, const Side& side, bool connecting, const Hello& mine, Hello theirs,
                    LinkKeys* keys) {
  const auto deadline = [&] { return now_ms() + side.timeout_ms; };
  Result result = read_hello(channel, deadline(), &theirs);
  if (!result.ok()) return result;
  if (std::equal(mine.begin() + 24, mine.begin() + 56, theirs.begin() + 24)) {
    return failure(HETKV_AUTHENTICATION, channel.peer() + ": handshake was reflected");
  }
  const Role role = side.description.role;
  if (theirs[16] == static_cast<std::uint8_t>(role)) {
    return failure(HETKV_HANDSHAKE, channel.peer() + ": both sides are " + name_of(role) + "s");
  }
  const bool sends = role == Role::kSender;
  const Schedule schedule(side.secret, (sends ? mine : theirs).data(), (sends ? theirs : mine).data(), kHelloBytes);
  if (connecting) result = prove(channel, schedule.proof(role), deadline());
  if (result.ok()) result = verify(channel, schedule.proof(other(role)), deadline());
  if (result.ok() && !connecting) result = prove(channel, schedule.proof(role), deadline());
  if (!result.ok()) return result;
  channel.end_when_silent(3 * side.description.heartbeat_timeout_ms);
  *keys = keys_of(schedule, role, get<std::uint16_t>(theirs.data(), 10));
  return result;
}

Result incompatible(const Channel& channel, const Incompatible& found) {
  return failure(HETKV_INCOMPATIBLE, channel.peer() + ": " + found.field + ": this side has " + found.mine +
                                         ", the peer has " + found.theirs +
                                         (found.why.empty() ? "" : " (" + found.why + ")"));
}

Result expect(Linked& link, MessageKind kind, const char* what, std::int64_t deadline, Message* out) {
  Result result = link.records.read(link.channel, out, deadline, what);
  if (!result.ok()) return result;
  if (out->kind == MessageKind::kRefusal) {
    return incompatible(link.channel, {out->field, out->theirs, out->mine, out->why});
  }
  if (out->kind != kind)
    return failure(HETKV_MESSAGE, link.channel.peer() + ": another message instead of its " + what);
  return {};
}

// Descriptions and verdicts. The connecting side describes first.
Result agree(Linked& link, const Side& side, bool connecting) {
  const auto deadline = [&] { return now_ms() + side.timeout_ms; };
  const auto write = [&](const Bytes& message) { return link.records.write(link.channel, message, deadline()); };
  if (link.keys.minor < kMinor) {
    return failure(HETKV_VERSION_MISMATCH, link.channel.peer() + ": the peer is of minor version " +
                                               std::to_string(link.keys.minor) + ", this library needs " +
                                               std::to_string(kMinor));
  }
  Result result;
  if (connecting) result = write(encode(side.description));
  Message message;
  if (result.ok()) result = expect(link, MessageKind::kDescription, "description", deadline(), &message);
  if (result.status == HETKV_MESSAGE) {
    (void)write(encode_refusal("description", "a well-formed description expected", "a malformed one", result.detail));
  }
  if (!result.ok()) return result;
  link.theirs = std::move(message.description);
  if (link.theirs.role == side.description.role) return failure(HETKV_MESSAGE, link.channel.peer() + ": its role");
  if (!connecting) result = write(encode(side.description));
  if (!result.ok()) return result;
  const Incompatible found = control::agree(side.description, link.theirs, &link.agreement);
  if (found.found()) {
    (void)write(encode_refusal(found.field, found.mine, found.theirs, found.why));
    return incompatible(link.channel, found);
  }
  result = write(encode_accept());
  return result.ok() ? expect(link, MessageKind::kAccept, "verdict", deadline(), &message) : result;
}

// Streams: magic, version, length, number of the link, index, zeros; then a tag over the listener's hello and this.
Hello call_head(const LinkKeys& keys, std::size_t index) {
  Hello head(kCallBytes - kTagBytes);
  std::memcpy(head.data(), kStreamMagic, kMagicBytes);
  put(head, 8, kMajor);
  put(head, 10, kMinor);
  put(head, 12, static_cast<std::uint32_t>(kCallBytes));
  put(head, 16, keys.number);
  put(head, 24, static_cast<std::uint16_t>(index));
  return head;
}

Hash tag(const Hash& key, const Hello& hello, const Hello& head) {
  Hello both = hello;
  both.insert(both.end(), head.begin(), head.end());
  return hmac_sha256(key.data(), key.size(), both.data(), both.size());
}

Result call(const std::string& address, const LinkKeys& keys, std::size_t index, std::int64_t timeout_ms, int* out) {
  Channel channel;
  const std::int64_t deadline = now_ms() + timeout_ms;
  Result result = dial(address, deadline, &channel);
  if (result.ok()) result = channel.write(kStreamMagic, kMagicBytes, deadline);
  Hello hello(kMagicBytes);
  if (result.ok()) result = channel.read(hello.data(), kMagicBytes, deadline, "hello");
  if (result.ok()) result = read_hello(channel, deadline, &hello);
  if (!result.ok()) return result;
  const Hello head = call_head(keys, index);
  const Hash proof = tag(keys.call_send, hello, head);
  Hello rest(head.begin() + kMagicBytes, head.end());
  rest.insert(rest.end(), proof.begin(), proof.end());
  result = channel.write(rest.data(), rest.size(), deadline);
  std::uint8_t answer[kTagBytes];
  if (result.ok()) result = channel.read(answer, sizeof answer, deadline, "answer");
  if (!result.ok()) return result;
  if (!equal(tag(keys.call_receive, hello, head), answer)) {
    return failure(HETKV_AUTHENTICATION, address + ": a stream that the peer did not prove");
  }
  *out = channel.release();
  return {};
}

bool same_kernel(const std::string& a, const std::string& b) {
  return a.substr(0, a.find('/')) == b.substr(0, b.find('/'));
}

}  // namespace

Result connect(const std::string& address, const Side& side, Linked* out) {
  Result result = dial(address, now_ms() + side.timeout_ms, &out->channel);
  if (!result.ok()) return result;
  Channel& channel = out->channel;
  const Hello mine = make_hello(side.description.role);
  result = channel.write(mine.data(), mine.size(), now_ms() + side.timeout_ms);
  Hello theirs(kMagicBytes);
  if (result.ok()) result = channel.read(theirs.data(), kMagicBytes, now_ms() + side.timeout_ms, "hello");
  if (result.ok()) result = authenticate(channel, side, true, mine, theirs, &out->keys);
  if (!result.ok()) return result;
  out->records = Records(out->keys.control_send, out->keys.control_receive);
  result = agree(*out, side, true);
  if (!result.ok()) return result;
  int descriptor = -1;
  result = failure(HETKV_PEER_LOST, "");
  if (same_kernel(side.description.host, out->theirs.host)) {
    for (const std::string& name : out->theirs.sockets) {
      result = call(name, out->keys, 0, side.timeout_ms, &descriptor);
      if (result.ok()) break;
    }
  }
  out->unix_streams = result.ok();
  if (!result.ok()) result = call(address, out->keys, 0, side.timeout_ms, &descriptor);
  if (!result.ok()) return result;
  out->streams.push_back(descriptor);
  return out->records.write(channel, encode_streaming(out->unix_streams, 1), now_ms() + side.timeout_ms);
}

Result serve(Channel channel, const Side& side, Desk& desk, Linked* out, bool* is_stream) {
  const Hello mine = make_hello(side.description.role);
  Result result = channel.write(mine.data(), mine.size(), now_ms() + side.timeout_ms);
  Hello theirs(kMagicBytes);
  if (result.ok()) result = channel.read(theirs.data(), kMagicBytes, now_ms() + side.timeout_ms, "hello");
  if (!result.ok()) return result;
  *is_stream = std::memcmp(theirs.data(), kStreamMagic, kMagicBytes) == 0;
  if (*is_stream) return desk.accept(channel, mine, side.timeout_ms);
  result = authenticate(channel, side, false, mine, theirs, &out->keys);
  if (!result.ok()) return result;
  out->channel = std::move(channel);
  out->records = Records(out->keys.control_send, out->keys.control_receive);
  desk.expect(out->keys);
  result = agree(*out, side, false);
  Message message;
  if (result.ok()) result = expect(*out, MessageKind::kStreaming, "streams", now_ms() + side.timeout_ms, &message);
  if (result.ok()) {
    out->unix_streams = message.unix_sockets;
    result = desk.collect(out->keys, static_cast<std::size_t>(message.count), side.timeout_ms, &out->streams);
  }
  if (!result.ok()) desk.forget(out->keys);
  return result;
}

void Desk::expect(const LinkKeys& keys) {
  const std::lock_guard<std::mutex> lock(mutex_);
  awaited_[keys.number] = {keys, {}};
}

Result Desk::accept(Channel& channel, const Hello& sent, std::int64_t timeout_ms) {
  const std::int64_t deadline = now_ms() + timeout_ms;
  Hello call(kCallBytes);
  std::memcpy(call.data(), kStreamMagic, kMagicBytes);
  Result result = channel.read(call.data() + kMagicBytes, kCallBytes - kMagicBytes, deadline, "call");
  if (!result.ok()) return result;
  if (get<std::uint16_t>(call.data(), 8) != kMajor || get<std::uint32_t>(call.data(), 12) != kCallBytes) {
    return failure(HETKV_HANDSHAKE, channel.peer() + ": a call of another version");
  }
  const auto number = get<std::uint64_t>(call.data(), 16);
  const auto index = get<std::uint16_t>(call.data(), 24);
  LinkKeys keys;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = awaited_.find(number);
    if (at == awaited_.end() || index >= kMostStreams) {
      return failure(HETKV_AUTHENTICATION, channel.peer() + ": a stream for a connection that does not exist");
    }
    keys = at->second.keys;
  }
  const Hello head(call.begin(), call.end() - kTagBytes);
  if (!equal(tag(keys.call_receive, sent, head), call.data() + head.size())) {
    return failure(HETKV_AUTHENTICATION, channel.peer() + ": a stream without the key of its connection");
  }
  const Hash answer = tag(keys.call_send, sent, head);
  result = channel.write(answer.data(), answer.size(), deadline);
  if (!result.ok()) return result;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto at = awaited_.find(number);
  if (at == awaited_.end() || at->second.descriptors.count(index) != 0) {
    return failure(HETKV_AUTHENTICATION, channel.peer() + ": a stream came twice, or late");
  }
  at->second.descriptors[index] = channel.release();
  changed_.notify_all();
  return {};
}

Result Desk::collect(const LinkKeys& keys, std::size_t count, std::int64_t timeout_ms, std::vector<int>* out) {
  std::unique_lock<std::mutex> lock(mutex_);
  const bool whole = changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] {
    const auto& found = awaited_[keys.number].descriptors;
    for (std::size_t index = 0; index < count; ++index) {
      if (found.count(index) == 0) return false;
    }
    return true;
  });
  if (!whole) return failure(HETKV_TIMEOUT, "timed out waiting for the peer's data connections");
  for (const auto& [index, descriptor] : awaited_[keys.number].descriptors) out->push_back(descriptor);
  awaited_.erase(keys.number);
  return {};
}

void Desk::forget(const LinkKeys& keys) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [index, descriptor] : awaited_[keys.number].descriptors) ::close(descriptor);
  awaited_.erase(keys.number);
}

}  // namespace hetkv::control
