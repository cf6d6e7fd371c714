// What comes in on a stream.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "transport/stream.h"
#include "transport/stream_limits.h"

namespace hetkv::transport {
namespace {

constexpr std::size_t kMostDecoded = 128 * 1024;  // bytes, before other streams have their turn: some 0.1 ms
constexpr std::size_t kMostDescriptors = 64;      // that wait for their frames

}  // namespace

bool Stream::read() {
  std::size_t moved = 0;
  decoded_ = 0;
  while (!ended_ && moved < kMostAtOnce && decoded_ < kMostDecoded) {
    const long bytes = receive();
    if (bytes <= 0) break;
    moved += static_cast<std::size_t>(bytes);
    if (!(open_seal_ ? parse_sealed() : parse())) break;
    if (emptied_) break;  // epoll reports what comes from now on
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
  emptied_ = bytes < 0 && errno == EAGAIN;
  if (emptied_) return -1;
  if (bytes <= 0) {
    ended_ = true;
    owner_.fail(broken(bytes < 0 ? errno : 0));
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
  emptied_ = got < direct + pieces[count - 1].iov_len;
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
  Status status = codec::read_header(body, header_.length, kMostSealed, accept_, &part);
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

}  // namespace hetkv::transport
