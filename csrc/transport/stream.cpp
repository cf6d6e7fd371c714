#include "transport/stream.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "transport/stream_limits.h"

namespace hetkv::transport {
namespace {

constexpr std::size_t kMostPieces = 16;  // of one sendmsg
constexpr int kLocalBuffer = 4 << 20;    // of a unix socket; TCP's grow by themselves

void set(int descriptor, int level, int option, int value) {
  static_cast<void>(setsockopt(descriptor, level, option, &value, sizeof value));  // an improvement, if it works
}

}  // namespace

Stream::Stream(StreamOwner& owner, int descriptor, const StreamConfig& config, bool first, codec::ValuesMask accept)
    : owner_(owner),
      descriptor_(descriptor),
      send_key_(config.send_key),
      receive_key_(config.receive_key),
      first_(first),
      accept_(accept),
      head_bytes_(config.cipher == Cipher::kNone ? sizeof(FrameHeader) : kClearBytes + sizeof(SealTag)),
      in_(config.cipher == Cipher::kNone && accept == 0 ? kInputBytes : kWholeInput) {
  if (accept != 0) decoder_.emplace();
  if (config.cipher != Cipher::kNone) {
    close_seal_.emplace(config.cipher, config.send_seal);
    open_seal_.emplace(config.cipher, config.receive_seal);
  }
  sockaddr_storage name{};
  socklen_t length = sizeof name;
  local_ = getsockname(descriptor, reinterpret_cast<sockaddr*>(&name), &length) == 0 && name.ss_family == AF_UNIX;
  static_cast<void>(fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK));
  if (local_) {
    for (const int option : {SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE}) {
      set(descriptor, SOL_SOCKET, option, kLocalBuffer);
    }
  } else {
    set(descriptor, IPPROTO_TCP, TCP_NODELAY, 1);
  }
}

Stream::~Stream() {
  close(descriptor_);
  for (const int waiting : descriptors_) close(waiting);
  for (const auto& frame : out_) {
    if (frame.descriptor >= 0) close(frame.descriptor);
  }
}

// What the owner learns of a socket that fails, or with 0 has ended.
Status Stream::broken(int error) {
  return Status::error(Code::kPeerLost, error == 0 ? std::string("the peer's data connection ended")
                                                   : std::string("data connection: ") + std::strerror(error));
}

void Stream::append(Outgoing frame) {
  bool coded = false;
  if (frame.put != nullptr) {
    frame.plain = frame.header.length;
    frame.body = std::move(spare_);
    coded = owner_.code_part(frame.data, frame.plain, &frame.body);
  }
  if (coded) {
    frame.header.kind = FrameKind::kCoded;
    frame.header.length = static_cast<std::uint32_t>(frame.body.size());
  }
  if (close_seal_) {
    const std::size_t bytes = frame.header.length;
    frame.body.resize(bytes);
    const void* plain = frame.put != nullptr && !coded ? frame.data : frame.body.data();
    close_seal_->close(&frame.header, kClearBytes, plain, bytes, frame.body.data(), &frame.tag);
  } else {
    frame.header.mac = frame_mac(frame.header, frames_out_++, send_key_);
  }
  queued_bytes_ += head_bytes_ + frame.header.length;
  out_.push_back(std::move(frame));
  Outgoing& last = out_.back();
  if (last.put == nullptr || coded || close_seal_) last.data = last.body.data();
}

void Stream::queue(FrameHeader header, std::vector<std::uint8_t> body) {
  append({header, {}, std::move(body), nullptr, -1, nullptr, 0});
}

Status Stream::queue_window(FrameHeader header, int descriptor) {
  const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return Status::error(Code::kTransport, std::string("no descriptor is left: ") + std::strerror(errno));
  append({header, {}, {}, nullptr, own, nullptr, 0});
  return {};
}

bool Stream::write() {
  std::size_t moved = 0;
  more_ = true;
  while (!ended_ && moved < kMostAtOnce) {
    if (out_.empty()) {
      Outgoing part;
      part.put = owner_.next_part(&part.header, &part.data);
      if (part.put == nullptr) {
        more_ = false;
        break;
      }
      append(std::move(part));
      if (out_.back().header.kind == FrameKind::kCoded) moved += kMostAtOnce;  // coding takes long: one in a turn
    }
    iovec pieces[kMostPieces];
    std::size_t count = 0;
    std::size_t skip = out_done_;
    std::size_t asked = 0;
    for (auto& frame : out_) {
      if (count + 3 > kMostPieces || (frame.descriptor >= 0 && count > 0)) break;  // a descriptor begins its call
      const std::size_t head = head_bytes_;
      const std::size_t whole = close_seal_ ? kClearBytes : head;  // of what is sent of `header`
      if (skip < whole) pieces[count++] = {reinterpret_cast<std::uint8_t*>(&frame.header) + skip, whole - skip};
      if (skip < head && whole < head) {
        const std::size_t done = std::max(skip, whole) - whole;
        pieces[count++] = {frame.tag.data() + done, head - whole - done};
      }
      const std::size_t done = skip > head ? skip - head : 0;
      if (done < frame.header.length) {
        pieces[count++] = {const_cast<std::uint8_t*>(frame.data) + done, frame.header.length - done};
      }
      asked += head + frame.header.length - skip;
      skip = 0;
      if (frame.descriptor >= 0) break;
    }
    msghdr message{};
    message.msg_iov = pieces;
    message.msg_iovlen = count;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (out_.front().descriptor >= 0) {
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      cmsghdr* item = CMSG_FIRSTHDR(&message);
      item->cmsg_level = SOL_SOCKET;
      item->cmsg_type = SCM_RIGHTS;
      item->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(item), &out_.front().descriptor, sizeof(int));
    }
    const ssize_t bytes = sendmsg(descriptor_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (bytes < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != ENOBUFS) {
        ended_ = true;
        owner_.fail(broken(errno));
      }
      break;
    }
    moved += static_cast<std::size_t>(bytes);
    sent(static_cast<std::size_t>(bytes));
    if (static_cast<std::size_t>(bytes) < asked && !local_) break;  // the socket is full
  }
  return moved > 0;
}

void Stream::sent(std::size_t bytes) {
  queued_bytes_ -= bytes;
  bytes += out_done_;
  out_done_ = 0;
  while (!out_.empty()) {
    Outgoing& frame = out_.front();
    if (frame.descriptor >= 0 && bytes > 0) close(std::exchange(frame.descriptor, -1));  // it left with the first byte
    const std::size_t whole = head_bytes_ + frame.header.length;
    if (bytes < whole) break;
    bytes -= whole;
    StreamPut* put = frame.put;
    const std::size_t length = frame.plain;
    if (put != nullptr) spare_ = std::move(frame.body);
    out_.pop_front();
    if (put != nullptr) owner_.on_part_sent(put, length);
  }
  out_done_ = bytes;
}

// --- the end ---

void Stream::shut() {
  ended_ = true;
  static_cast<void>(shutdown(descriptor_, SHUT_WR));
}

// What is unread when a socket is closed would make TCP throw away what the peer has not read yet.
bool Stream::discard() {
  for (std::size_t moved = 0; moved < kMostAtOnce;) {
    const ssize_t bytes = recv(descriptor_, in_.data(), in_.size(), MSG_DONTWAIT);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0 && errno == EAGAIN) return false;
    if (bytes <= 0) return true;
    moved += static_cast<std::size_t>(bytes);
  }
  return false;
}

}  // namespace hetkv::transport
