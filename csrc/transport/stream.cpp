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

namespace hetkv::transport {
namespace {

constexpr std::size_t kInputBytes = 256 * 1024;
constexpr std::size_t kAhead = 8 * 1024;  // read beyond what is under way: what is a payload there is copied once more
constexpr std::size_t kMostAtOnce = std::size_t{4} << 20;  // of one stream, before others have their turn
constexpr std::size_t kMostDecoded = 128 * 1024;           // the same of what is decoded: some 0.1 ms
constexpr std::size_t kMostPieces = 16;                    // of one sendmsg
constexpr std::size_t kMostDescriptors = 64;               // that wait for their frames
constexpr int kLocalBuffer = 4 << 20;                      // of a unix socket; TCP's grow by themselves
constexpr std::size_t kMostMessage = wire::kMaxMessageBytes;
constexpr std::size_t kClearBytes = offsetof(FrameHeader, mac);  // of a header, ahead of its MAC or tag
constexpr std::size_t kWholeInput = kMostSealed + kClearBytes + sizeof(SealTag) + 2 * kAhead;

Status lost(int error) {
  return Status::error(Code::kPeerLost, error == 0 ? std::string("the peer's data connection ended")
                                                   : std::string("data connection: ") + std::strerror(error));
}

void set(int descriptor, int level, int option, int value) {
  static_cast<void>(setsockopt(descriptor, level, option, &value, sizeof value));  // an improvement, if it works
}

}  // namespace

Stream::Stream(StreamOwner& owner, int descriptor, const StreamConfig& config, bool first, bool decodes)
    : owner_(owner),
      descriptor_(descriptor),
      send_key_(config.send_key),
      receive_key_(config.receive_key),
      first_(first),
      head_bytes_(config.cipher == Cipher::kNone ? sizeof(FrameHeader) : kClearBytes + sizeof(SealTag)),
      in_(config.cipher == Cipher::kNone && !decodes ? kInputBytes : kWholeInput) {
  if (decodes) decoder_.emplace();
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

// --- out ---

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
        owner_.fail(lost(errno));
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

// --- in ---

bool Stream::read() {
  std::size_t moved = 0;
  decoded_ = 0;
  while (!ended_ && moved < kMostAtOnce && decoded_ < kMostDecoded) {
    const long bytes = receive();
    if (bytes <= 0) break;
    moved += static_cast<std::size_t>(bytes);
    if (!(open_seal_ ? parse_sealed() : parse())) break;
  }
  return moved > 0;
}

// Bytes that the frame that is being read lacks in the buffer, as far as is known.
std::size_t Stream::missing() const {
  const std::size_t left = in_end_ - in_begin_;
  if (!open_seal_) return have_header_ ? header_.length - std::min<std::size_t>(header_.length, left) : 0;
  if (left < head_bytes_) return head_bytes_ - left;
  FrameHeader header;
  std::memcpy(&header, in_.data() + in_begin_, sizeof header);  // its last bytes are of the tag
  return head_bytes_ + header.length - left;                    // at most kMostSealed: see parse_sealed()
}

// Into the slot, as far as the part that is being read goes, and into the buffer what follows.
long Stream::receive() {
  iovec pieces[2];
  std::size_t count = 0;
  std::size_t direct = 0;
  if (have_header_ && header_.kind == FrameKind::kPayload) {
    direct = header_.length - part_done_;
    void* to = owner_.on_part(header_, part_done_);
    if (to == nullptr) return -1;
    pieces[count++] = {to, direct};
  }
  if (in_begin_ == in_end_) in_begin_ = in_end_ = 0;
  const std::size_t rest = direct == 0 ? missing() : 0;
  if (in_.size() - in_end_ < std::max(rest + kAhead, open_seal_ ? 0 : kMostMessage + sizeof header_)) {
    std::memmove(in_.data(), in_.data() + in_begin_, in_end_ - in_begin_);
    in_end_ -= in_begin_;
    in_begin_ = 0;
  }
  pieces[count++] = {in_.data() + in_end_, std::min(rest + kAhead, in_.size() - in_end_)};
  msghdr call{};
  call.msg_iov = pieces;
  call.msg_iovlen = count;
  alignas(cmsghdr) char control[CMSG_SPACE(16 * sizeof(int))];
  if (local_) {
    call.msg_control = control;
    call.msg_controllen = sizeof control;
  }
  ssize_t bytes;
  do {
    bytes = recvmsg(descriptor_, &call, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (bytes < 0 && errno == EINTR);
  if (bytes < 0 && errno == EAGAIN) return -1;
  if (bytes <= 0) {
    ended_ = true;
    owner_.fail(lost(bytes < 0 ? errno : 0));
    return -1;
  }
  for (cmsghdr* item = local_ ? CMSG_FIRSTHDR(&call) : nullptr; item != nullptr; item = CMSG_NXTHDR(&call, item)) {
    if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS) continue;
    for (std::size_t at = 0; at + sizeof(int) <= item->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
      int descriptor;
      std::memcpy(&descriptor, CMSG_DATA(item) + at, sizeof descriptor);
      descriptors_.push_back(descriptor);
    }
  }
  if (descriptors_.size() > kMostDescriptors) {
    owner_.fail(Status::error(Code::kMalformed, "the peer sent descriptors that belong to no frame"));
    return -1;
  }
  const auto got = static_cast<std::size_t>(bytes);
  part_done_ += std::min(got, direct);
  in_end_ += got - std::min(got, direct);
  return static_cast<long>(bytes);
}

// Takes all that is whole. False: the link has failed.
bool Stream::parse() {
  while (!ended_) {
    const std::size_t left = in_end_ - in_begin_;
    if (!have_header_) {
      if (left < sizeof header_) return true;
      std::memcpy(&header_, in_.data() + in_begin_, sizeof header_);
      if (header_.mac != frame_mac(header_, frames_in_, receive_key_)) {
        return end(Code::kBadMac, "a frame of the data connection has a wrong MAC");
      }
      ++frames_in_;
      in_begin_ += sizeof header_;
      have_header_ = true;
      part_done_ = 0;
      continue;
    }
    Status status;
    switch (header_.kind) {
      case FrameKind::kPayload:
        if (!take_payload()) return false;
        if (part_done_ < header_.length) return true;
        have_header_ = false;
        owner_.on_part_end(header_);
        continue;
      case FrameKind::kMessage:
        if (!first_ || header_.length > kMostMessage) break;
        if (left < header_.length) return true;
        in_begin_ += header_.length;
        have_header_ = false;
        owner_.on_frame(header_, in_.data() + in_begin_ - header_.length);
        continue;
      case FrameKind::kWindow: {
        if (!first_ || header_.length != 0 || descriptors_.empty()) break;
        const int descriptor = descriptors_.front();
        descriptors_.pop_front();
        have_header_ = false;
        owner_.on_window(header_, descriptor);
        continue;
      }
      case FrameKind::kCoded:
        if (!decoder_ || header_.length > kMostSealed) break;
        if (left < header_.length) return true;
        in_begin_ += header_.length;
        have_header_ = false;
        if (!take_coded(in_.data() + in_begin_ - header_.length)) return false;
        continue;
    }
    return misplaced();
  }
  return false;
}

// The same of an encrypted stream. Nothing of a frame but its length is looked at before the whole of it is authentic.
bool Stream::parse_sealed() {
  while (!ended_) {
    const std::size_t left = in_end_ - in_begin_;
    if (left < head_bytes_) return true;
    std::uint8_t* at = in_.data() + in_begin_;
    std::memcpy(&header_, at, sizeof header_);  // its last bytes are of the tag
    if (header_.length > kMostSealed) {
      return end(Code::kMalformed, "an encrypted frame of " + std::to_string(header_.length) + " bytes is too long");
    }
    if (left < head_bytes_ + header_.length) return true;
    SealTag given;
    std::memcpy(given.data(), at + kClearBytes, sizeof given);
    std::uint8_t* body = at + head_bytes_;
    if (!open_seal_->open(&header_, kClearBytes, body, header_.length, given)) {
      return end(Code::kBadMac, "an encrypted frame of the data connection was altered");
    }
    in_begin_ += head_bytes_ + header_.length;
    if (!take_whole(body)) return false;
  }
  return false;
}

// A frame that is whole and authentic.
bool Stream::take_whole(std::uint8_t* body) {
  if (header_.kind == FrameKind::kPayload) {
    void* to = owner_.on_part(header_, 0);
    if (to == nullptr) {
      ended_ = true;
      return false;
    }
    std::memcpy(to, body, header_.length);
    owner_.on_part_end(header_);
    return true;
  }
  if (header_.kind == FrameKind::kCoded && decoder_) return take_coded(body);
  if (header_.kind != FrameKind::kMessage || !first_ || header_.length > kMostMessage) return misplaced();
  owner_.on_frame(header_, body);
  return true;
}

// A coded part that is whole. What it decodes to is a part as if it had come so.
bool Stream::take_coded(const std::uint8_t* body) {
  codec::PartHeader part;
  Status status = codec::read_header(body, header_.length, kMostSealed, &part);
  if (status.ok() && header_.offset % 2 != 0) {
    status = Status::error(Code::kMalformed, "a coded payload begins at an odd offset");
  }
  if (!status.ok()) return end(status.code, std::move(status.detail));
  FrameHeader plain = header_;
  plain.kind = FrameKind::kPayload;
  plain.length = part.plain_bytes;
  void* to = owner_.on_part(plain, 0);
  if (to == nullptr) {
    ended_ = true;
    return false;
  }
  status = decoder_->decode(part, body, header_.length, static_cast<std::uint8_t*>(to));
  if (!status.ok()) return end(status.code, std::move(status.detail));
  decoded_ += part.plain_bytes;
  owner_.on_part_end(plain);
  return true;
}

bool Stream::misplaced() {
  return end(Code::kMalformed, "a frame of kind " + std::to_string(static_cast<int>(header_.kind)) + " with " +
                                   std::to_string(header_.length) + " bytes does not belong on this connection");
}

// The link has failed.
bool Stream::end(Code code, std::string why) {
  ended_ = true;
  owner_.fail(Status::error(code, std::move(why)));
  return false;
}

// Moves what the buffer has of the part to where it goes.
bool Stream::take_payload() {
  const std::size_t bytes = std::min<std::size_t>(in_end_ - in_begin_, header_.length - part_done_);
  void* to = owner_.on_part(header_, part_done_);
  if (to == nullptr) {
    ended_ = true;
    return false;
  }
  if (bytes == 0) return true;
  std::memcpy(to, in_.data() + in_begin_, bytes);
  in_begin_ += bytes;
  part_done_ += bytes;
  return true;
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
