// Fuzzer of a listener's handshake: a stranger, a peer with the secret, a call for a stream.
//
// The listener's random bytes are fixed here, so that all that the other side sends can be made beforehand. Input: a
// byte for the kind, then
//   0: what a stranger sends
//   1: a peer with the secret: minor version (2 bytes), the version's text (32), then records of a length (2 bytes) and
//      a payload, each with its sequence number and MAC; a length with bit 15 set spoils the record's MAC
//   2: a call for a stream: a byte that is added to its tag, then what the tag covers after the magic
#include "control/handshake.h"

#include <sodium.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace {

using namespace hetkv::control;

constexpr std::size_t kProofBytes = 36, kHead = 32, kVersionBytes = 32, kNonceAt = 24;
constexpr std::uint64_t kLink = 7;

void require(bool holds) {
  if (!holds) std::abort();
}

void fill(void* out, std::size_t bytes) {
  std::memset(out, 0x5a, bytes);
}
std::uint32_t word() {
  return 0x5a5a5a5a;
}
const char* implementation() {
  return "fixed";
}

// A receiver of the layers and heads that the seeds' senders have (seeds.py).
Side make_side() {
  Side side;
  side.secret.assign(32, 9);
  side.timeout_ms = 1;
  Description& mine = side.description;
  mine.role = Role::kReceiver;
  mine.instance = "receiver-0";
  mine.pid = 1;
  mine.host = "kernel/namespace";
  LayerSpec layer;
  layer.kind = "kv";
  layer.segments = {{"k", 2, 16}, {"v", 2, 16}};
  mine.spec.layers = {layer, layer};
  mine.shard = Shard::of(mine.spec, 1, 0, 1, 0);
  LayerGroup group;
  group.layers = {0, 1};
  group.blocks = 8;
  group.layout.name = "nhd";
  group.layout.block_size = 16;
  for (const char* name : {"k", "v"}) {
    SegmentLayout& at = group.layout.segments[name];
    at.dtype = *dtype_of("bfloat16");
    at.heads = 2;
    at.channels = at.pack = 16;
    at.block_stride = 16 * 64;
    at.token_stride = 64;
    at.head_stride = 32;
    at.inner_stride = 2;
  }
  mine.layers = {group};
  mine.slot_bytes = 1 << 20;
  mine.heartbeat_interval_ms = 500;
  mine.heartbeat_timeout_ms = 3000;
  mine.lease_ms = 30000;
  mine.engine.assign(16, 1);
  require(mine.check().ok());
  return side;
}

class Listener {
 public:
  Listener() : side_(make_side()) {
    static randombytes_implementation fixed = {implementation, word, nullptr, nullptr, fill, nullptr};
    require(randombytes_set_implementation(&fixed) == 0 && sodium_init() >= 0);
    serve_bytes({}, &hello_);
    require(hello_.size() == kHelloBytes);
  }
  const Side& side() const { return side_; }
  const Hello& hello() const { return hello_; }

  struct Served {
    bool done = false, stream = false;
  };
  Served serve_bytes(const Hello& sent, Hello* answer) {
    int ends[2];
    require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    require(send(ends[1], sent.data(), sent.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(sent.size()));
    require(shutdown(ends[1], SHUT_WR) == 0);
    Served out;
    {
      Desk desk;
      LinkKeys awaited;
      awaited.number = kLink;
      awaited.call_receive.fill(3);
      desk.expect(awaited);
      Linked linked;
      out.done = serve(Channel(ends[0], "fuzzer"), side_, desk, &linked, &out.stream).ok();
      for (const int stream : linked.streams) close(stream);
      desk.forget(awaited);
    }
    if (answer != nullptr) {
      answer->resize(1 << 16);
      const ssize_t bytes = recv(ends[1], answer->data(), answer->size(), MSG_DONTWAIT);
      answer->resize(static_cast<std::size_t>(std::max<ssize_t>(0, bytes)));
    }
    require(close(ends[1]) == 0);
    return out;
  }

 private:
  const Side side_;
  Hello hello_;
};

void append(Hello& out, const void* data, std::size_t bytes) {
  const auto* at = static_cast<const std::uint8_t*>(data);
  out.insert(out.end(), at, at + bytes);
}

// What a sender with the secret sends.
Hello peer(const Listener& listener, const std::uint8_t* data, std::size_t size) {
  if (size < 2 + kVersionBytes) return {};
  Hello hello(listener.hello());
  std::memcpy(hello.data() + 10, data, 2);
  hello[16] = static_cast<std::uint8_t>(Role::kSender);
  std::fill_n(hello.begin() + kNonceAt, 32, std::uint8_t{0x11});
  std::memcpy(hello.data() + kHelloBytes - kVersionBytes, data + 2, kVersionBytes);
  const Schedule schedule(listener.side().secret, hello.data(), listener.hello().data(), kHelloBytes);
  Hello out = hello;
  const std::uint8_t prove[4] = {1};
  append(out, prove, sizeof prove);
  const Hash proof = schedule.proof(Role::kSender);
  append(out, proof.data(), proof.size());
  const Hash key = schedule.key("control sender");
  std::uint64_t sequence = 0;
  for (std::size_t at = 2 + kVersionBytes; at + 2 <= size; ++sequence) {
    const unsigned word = data[at] | static_cast<unsigned>(data[at + 1]) << 8;
    at += 2;
    const auto length = static_cast<std::uint32_t>(std::min<std::size_t>(word & 0x7fffu, size - at));
    const std::uint32_t zero = 0;
    Hello record;
    append(record, &length, sizeof length);
    append(record, &zero, sizeof zero);
    append(record, &sequence, sizeof sequence);
    append(record, data + at, length);
    at += length;
    Hash mac = hmac_sha256(key.data(), key.size(), record.data(), record.size());
    if ((word & 0x8000u) != 0) mac[31] ^= 1;
    append(record, mac.data(), mac.size());
    append(out, record.data(), record.size());
  }
  return out;
}

// A call for a stream.
Hello call(const Listener& listener, const std::uint8_t* data, std::size_t size) {
  if (size < 1 + kHead - kMagicBytes) return {};
  Hello out;
  append(out, kStreamMagic, kMagicBytes);
  append(out, data + 1, kHead - kMagicBytes);
  Hello covered = listener.hello();
  append(covered, out.data(), out.size());
  Hash key;
  key.fill(3);
  Hash tag = hmac_sha256(key.data(), key.size(), covered.data(), covered.size());
  tag[0] = static_cast<std::uint8_t>(tag[0] + data[0]);
  append(out, tag.data(), tag.size());
  append(out, data + 1 + kHead - kMagicBytes, size - 1 - kHead + kMagicBytes);
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Listener listener;
  if (size < 1 || size > 32768) return 0;
  const int least = dup(0);
  require(close(least) == 0);
  const int kind = data[0];
  if (kind == 0) {
    const auto served = listener.serve_bytes(Hello(data + 1, data + size), nullptr);
    require(!served.done);
  } else if (kind == 1) {
    const auto served = listener.serve_bytes(peer(listener, data + 1, size - 1), nullptr);
    require(!served.stream);
  } else if (kind == 2) {
    const Hello sent = call(listener, data + 1, size - 1);
    const auto served = listener.serve_bytes(sent, nullptr);
    if (served.done) {
      std::uint64_t link = 0;
      std::memcpy(&link, sent.data() + 16, sizeof link);
      require(served.stream && data[1] == 0 && link == kLink);
    }
  }
  const int probe = dup(0);  // the lowest number that is free: no descriptor was left open
  require(probe == least && close(probe) == 0);
  return 0;
}
