// Fuzzer of the data plane's streams: frames that a peer with the key could send, in two writes.
//
// Input: a byte that says where the second write begins, then frames: a byte (bit 0: the MAC is wrong; bit 1: a
// descriptor comes with it), a header without its MAC, the bytes that belong to it as far as there are some. With
// HETKV_FUZZ_SEALED the stream is encrypted. Coded parts may come where libzstd is there.
#include "transport/stream.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace {

using namespace hetkv;
using transport::FrameHeader;
using transport::FrameKind;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kUnsigned = offsetof(FrameHeader, mac);
constexpr std::size_t kMostPart = 1 << 16;
const wire::SipKey kKey{1, 2, 3};
const auto kAccept =
    static_cast<codec::ValuesMask>(codec::mask_of(codec::Values::kInt4) | (codec::has_zstd() ? codec::kZstdValues : 0));

transport::StreamConfig stream_config() {
  transport::StreamConfig config;
  config.send_key = config.receive_key = kKey;
#ifdef HETKV_FUZZ_SEALED
  config.cipher = transport::Cipher::kChaCha20Poly1305;
#endif
  return config;
}

void require(bool holds) {
  if (!holds) std::abort();
}

struct Sent {
  FrameHeader header;
  Bytes body;
};

// Gives each part memory of just its size, and compares what comes with what was sent.
class Owner final : public transport::StreamOwner {
 public:
  std::vector<Sent> sent;
  bool failed = false;

  void on_frame(const FrameHeader& header, const std::uint8_t* data) override {
    const Sent& expected = next(header, FrameKind::kMessage);
    require(expected.body.size() == header.length && std::equal(data, data + header.length, expected.body.begin()));
  }
  void on_window(const FrameHeader& header, int descriptor) override {
    static_cast<void>(next(header, FrameKind::kWindow));
    require(close(descriptor) == 0);
  }
  void* on_part(const FrameHeader& header, std::size_t done) override {
    require(done <= header.length);
    if (header.length > kMostPart || header.offset % 2 != 0) {
      failed = true;
      return nullptr;
    }
    if (!part_) part_.reset(new std::uint8_t[header.length]);
    return part_.get() + done;
  }
  void on_part_end(const FrameHeader& header) override {
    require(header.kind == FrameKind::kPayload && taken_ < sent.size());
    const Sent& expected = sent[taken_];
    if (expected.header.kind == FrameKind::kCoded) {
      ++taken_;
      Bytes decoded(header.length);
      codec::PartHeader part;
      codec::PartDecoder decoder;
      require(codec::read_header(expected.body.data(), expected.body.size(), kMostPart, kAccept, &part).ok() &&
              part.plain_bytes == header.length);
      require(decoder.decode(part, expected.body.data(), expected.body.size(), decoded.data()).ok());
      require(header.number == expected.header.number && header.offset == expected.header.offset);
      require(std::equal(decoded.begin(), decoded.end(), part_.get()));
      part_.reset();
      return;
    }
    static_cast<void>(next(header, FrameKind::kPayload));
    require(expected.body.size() == header.length &&
            std::equal(expected.body.begin(), expected.body.end(), part_.get()));
    part_.reset();
  }
  transport::StreamPut* next_part(FrameHeader*, const std::uint8_t**) override { return nullptr; }
  bool code_part(const std::uint8_t*, std::size_t, Bytes*) override { return false; }
  void on_part_sent(transport::StreamPut*, std::size_t) override {}
  void fail(Status status) override {
    require(!status.ok());
    failed = true;
  }

 private:
  const Sent& next(const FrameHeader& header, FrameKind kind) {
    require(!failed && taken_ < sent.size());
    const Sent& expected = sent[taken_++];
    require(header.kind == kind && std::memcmp(&header, &expected.header, sizeof header) == 0);
    return expected;
  }
  std::unique_ptr<std::uint8_t[]> part_;
  std::size_t taken_ = 0;
};

void write_all(int to, const Bytes& bytes, std::size_t begin, std::size_t end, int descriptor) {
  iovec piece{const_cast<std::uint8_t*>(bytes.data()) + begin, end - begin};
  msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (descriptor >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* item = CMSG_FIRSTHDR(&message);
    item->cmsg_level = SOL_SOCKET;
    item->cmsg_type = SCM_RIGHTS;
    item->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(item), &descriptor, sizeof descriptor);
  }
  require(sendmsg(to, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(end - begin));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1 || size > 32768) return 0;
  static const int memory = memfd_create("fuzz", MFD_CLOEXEC);
  const int least = dup(memory);
  require(close(least) == 0);
  int ends[2];
  require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const std::size_t cut = data[0] * std::size_t{8};
  {
    Owner owner;
    transport::Stream stream(owner, ends[0], stream_config(), true, kAccept);
#ifdef HETKV_FUZZ_SEALED
    require(transport::has_cipher(transport::Cipher::kChaCha20Poly1305));
    transport::Seal seal(transport::Cipher::kChaCha20Poly1305, {});
#endif
    std::size_t total = 0;
    for (std::size_t at = 1, number = 0; at + 1 + kUnsigned <= size; ++number) {
      const std::uint8_t flags = data[at];
      Sent frame;
      std::memcpy(static_cast<void*>(&frame.header), data + at + 1, kUnsigned);
      at += 1 + kUnsigned;
      const std::size_t bytes = std::min<std::size_t>(frame.header.length, size - at);
      frame.body.assign(data + at, data + at + bytes);
      at += bytes;
#ifdef HETKV_FUZZ_SEALED
      static_cast<void>(number);
      Bytes whole(kUnsigned + sizeof(transport::SealTag) + bytes);
      transport::SealTag made;
      seal.close(&frame.header, kUnsigned, frame.body.data(), bytes, whole.data() + kUnsigned + sizeof made, &made);
      made[0] ^= flags & 1u;
      std::memcpy(&frame.header.mac, made.data(), sizeof frame.header.mac);
      std::memcpy(whole.data(), &frame.header, kUnsigned);
      std::memcpy(whole.data() + kUnsigned, made.data(), sizeof made);
#else
      frame.header.mac = transport::frame_mac(frame.header, number, kKey) ^ (flags & 1u);
      Bytes whole(sizeof frame.header + bytes);
      std::memcpy(whole.data(), &frame.header, sizeof frame.header);
      std::copy(frame.body.begin(), frame.body.end(), whole.begin() + sizeof frame.header);
#endif
      owner.sent.push_back(std::move(frame));
      const int descriptor = (flags & 2u) != 0 ? memory : -1;
      if (total < cut && cut < total + whole.size()) {
        write_all(ends[1], whole, 0, cut - total, descriptor);
        while (!owner.failed && stream.read()) {
        }
        write_all(ends[1], whole, cut - total, whole.size(), -1);
      } else {
        write_all(ends[1], whole, 0, whole.size(), descriptor);
      }
      total += whole.size();
      while ((flags & 4u) != 0 && !owner.failed && stream.read()) {
      }
    }
    while (!owner.failed && stream.read()) {
    }
  }
  require(close(ends[1]) == 0);
  const int probe = dup(memory);  // the lowest number that is free: no descriptor was left open
  require(probe == least && close(probe) == 0);
  return 0;
}
