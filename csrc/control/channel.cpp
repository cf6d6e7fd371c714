#include "control/channel.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>

namespace hetkv::control {
namespace {

constexpr std::size_t kHeader = 16, kMac = 32, kMostBytes = 1 << 20;

std::string system_text() {
  return std::strerror(errno);
}

struct FreeAddresses {
  void operator()(addrinfo* found) const { freeaddrinfo(found); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

// `host:port`, the host in brackets where it has colons; empty: all interfaces.
Result resolve(const std::string& address, bool passive, Addresses* out) {
  const std::size_t colon = address.rfind(':');
  if (colon == std::string::npos) return failure(HETKV_INPUT, "address '" + address + "': write host:port");
  std::string host = address.substr(0, colon);
  if (host.size() > 1 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  addrinfo* found = nullptr;
  const std::string port = address.substr(colon + 1);
  const int code = getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &found);
  if (code != 0) return failure(HETKV_INPUT, "address '" + address + "': " + gai_strerror(code));
  out->reset(found);
  return {};
}

bool set_nonblocking(int descriptor) {
  const int flags = fcntl(descriptor, F_GETFL);
  return flags >= 0 && fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) == 0;
}

// Connects within the deadline.
bool connect_until(int descriptor, const sockaddr* to, socklen_t size, std::int64_t deadline_ms) {
  if (!set_nonblocking(descriptor)) return false;
  if (connect(descriptor, to, size) == 0) return true;
  if (errno != EINPROGRESS) return false;
  pollfd ready{descriptor, POLLOUT, 0};
  const std::int64_t left = std::max<std::int64_t>(0, deadline_ms - now_ms());
  if (poll(&ready, 1, static_cast<int>(left)) != 1) {
    errno = ETIMEDOUT;
    return false;
  }
  int error = 0;
  socklen_t length = sizeof error;
  getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &error, &length);
  errno = error;
  return error == 0;
}

std::string name_of(const sockaddr_storage& at, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (getnameinfo(reinterpret_cast<const sockaddr*>(&at), size, host, sizeof host, port, sizeof port,
                  NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "";
  }
  const bool colons = std::strchr(host, ':') != nullptr;
  return (colons ? "[" + std::string(host) + "]" : std::string(host)) + ":" + port;
}

bool unix_address(const std::string& name, sockaddr_un* at, socklen_t* size) {
  if (name.size() >= sizeof at->sun_path) return false;
  at->sun_family = AF_UNIX;
  std::memcpy(at->sun_path, name.data(), name.size());
  const bool abstract = name[0] == '@';
  if (abstract) at->sun_path[0] = '\0';
  *size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size() + (abstract ? 0 : 1));
  return true;
}

}  // namespace

std::int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Channel::Channel(int descriptor, std::string peer) : descriptor_(descriptor), peer_(std::move(peer)) {
  set_nonblocking(descriptor);
  const int on = 1;  // on a unix socket both fail, which does no harm
  setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(descriptor, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
}

Channel& Channel::operator=(Channel&& other) noexcept {
  if (this != &other) {
    close();
    descriptor_ = std::exchange(other.descriptor_, -1);
    peer_ = std::move(other.peer_);
  }
  return *this;
}

Result Channel::wait(short event, std::int64_t deadline_ms, const char* what) {
  pollfd ready{descriptor_, event, 0};
  for (;;) {
    const std::int64_t left = deadline_ms == 0 ? -1 : std::max<std::int64_t>(0, deadline_ms - now_ms());
    const int count = poll(&ready, 1, static_cast<int>(std::min<std::int64_t>(left, 1 << 30)));
    if (count > 0) return {};
    if (count == 0 && left >= 0) return failure(HETKV_TIMEOUT, peer_ + ": timed out waiting for its " + what);
    if (count < 0 && errno != EINTR) return failure(HETKV_PEER_LOST, peer_ + ": " + system_text());
  }
}

Result Channel::read(void* out, std::size_t bytes, std::int64_t deadline_ms, const char* what) {
  auto* at = static_cast<char*>(out);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t count = recv(descriptor_, at + done, bytes - done, 0);
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (count == 0) {
      return failure(HETKV_PEER_LOST,
                     peer_ + ": connection closed " + (done > 0 ? "inside" : "before") + " its " + what);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
      Result result = wait(POLLIN, deadline_ms, what);
      if (!result.ok()) return result;
    } else {
      return failure(HETKV_PEER_LOST, peer_ + ": " + system_text());
    }
  }
  return {};
}

Result Channel::write(const void* data, std::size_t bytes, std::int64_t deadline_ms) {
  const auto* at = static_cast<const char*>(data);
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t count = send(descriptor_, at + done, bytes - done, MSG_NOSIGNAL);
    if (count >= 0) {
      done += static_cast<std::size_t>(count);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
      Result result = wait(POLLOUT, deadline_ms, "reading");
      if (!result.ok()) return result;
    } else {
      return failure(HETKV_PEER_LOST, peer_ + ": " + system_text());
    }
  }
  return {};
}

void Channel::end_when_silent(std::int64_t ms) {
  constexpr int kProbes = 3;
  const int step = static_cast<int>(std::max<std::int64_t>(1, ms / 1000 / (kProbes + 1)));
  const auto limit = static_cast<unsigned>(ms);
  setsockopt(descriptor_, IPPROTO_TCP, TCP_KEEPIDLE, &step, sizeof step);
  setsockopt(descriptor_, IPPROTO_TCP, TCP_KEEPINTVL, &step, sizeof step);
  setsockopt(descriptor_, IPPROTO_TCP, TCP_KEEPCNT, &kProbes, sizeof kProbes);
  setsockopt(descriptor_, IPPROTO_TCP, TCP_USER_TIMEOUT, &limit, sizeof limit);
}

void Channel::wake() {
  if (descriptor_ >= 0) shutdown(descriptor_, SHUT_RDWR);
}

int Channel::release() {
  return std::exchange(descriptor_, -1);
}

void Channel::close() {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
}

Result Records::write(Channel& channel, const Bytes& payload, std::int64_t deadline_ms) {
  if (payload.size() > kMostBytes) return failure(HETKV_MESSAGE, "a control message is over the limit of 1 MiB");
  Bytes record(kHeader);
  const auto length = static_cast<std::uint32_t>(payload.size());
  std::memcpy(record.data(), &length, sizeof length);
  std::memcpy(record.data() + 8, &sent_, sizeof sent_);
  ++sent_;
  record.insert(record.end(), payload.begin(), payload.end());
  const Hash mac = hmac_sha256(send_key_.data(), send_key_.size(), record.data(), record.size());
  record.insert(record.end(), mac.begin(), mac.end());
  return channel.write(record.data(), record.size(), deadline_ms);
}

Result Records::read(Channel& channel, Message* out, std::int64_t deadline_ms, const char* what) {
  Bytes record(kHeader);
  Result result = channel.read(record.data(), kHeader, deadline_ms, what);
  if (!result.ok()) return result;
  std::uint32_t length = 0, reserved = 0;
  std::uint64_t sequence = 0;
  std::memcpy(&length, record.data(), sizeof length);
  std::memcpy(&reserved, record.data() + 4, sizeof reserved);
  std::memcpy(&sequence, record.data() + 8, sizeof sequence);
  if (length > kMostBytes) return failure(HETKV_MESSAGE, channel.peer() + ": a control message is over the limit");
  record.resize(kHeader + length + kMac);
  result = channel.read(record.data() + kHeader, length + kMac, deadline_ms, what);
  if (!result.ok()) return result;
  const Hash mac = hmac_sha256(receive_key_.data(), receive_key_.size(), record.data(), kHeader + length);
  if (!equal(mac, record.data() + kHeader + length)) {
    return failure(HETKV_AUTHENTICATION, channel.peer() + ": a control message has a wrong MAC");
  }
  if (sequence != received_ || reserved != 0) {
    return failure(HETKV_MESSAGE, channel.peer() + ": a control message is out of sequence");
  }
  ++received_;
  const Status status = decode(record.data() + kHeader, length, out);
  if (!status.ok()) {
    return failure(HETKV_MESSAGE, channel.peer() + ": control message is malformed: " + status.detail);
  }
  return {};
}

Result dial(const std::string& address, std::int64_t deadline_ms, Channel* out) {
  const auto lost = [&] {
    return failure(errno == ETIMEDOUT ? HETKV_TIMEOUT : HETKV_PEER_LOST,
                   address + ": cannot connect: " + system_text());
  };
  if (address.empty()) return failure(HETKV_INPUT, "an address is missing");
  if (address[0] == '@' || address[0] == '/') {
    sockaddr_un at{};
    socklen_t size = 0;
    if (!unix_address(address, &at, &size)) return failure(HETKV_INPUT, address + ": too long for a unix socket");
    *out = Channel(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), address);
    if (!connect_until(out->descriptor(), reinterpret_cast<sockaddr*>(&at), size, deadline_ms)) return lost();
    return {};
  }
  Addresses found;
  Result result = resolve(address, false, &found);
  if (!result.ok()) return result;
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    *out = Channel(socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), address);
    if (connect_until(out->descriptor(), at->ai_addr, at->ai_addrlen, deadline_ms)) return {};
  }
  return lost();
}

Result listen_at(const std::string& address, int* descriptor, std::string* bound) {
  const auto failed = [&] { return failure(HETKV_INPUT, "cannot listen on " + address + ": " + system_text()); };
  if (address[0] == '@') {
    sockaddr_un at{};
    socklen_t size = 0;
    if (!unix_address(address, &at, &size)) return failure(HETKV_INPUT, address + ": too long for a unix socket");
    *descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(*descriptor, reinterpret_cast<sockaddr*>(&at), size) != 0 || ::listen(*descriptor, 64) != 0)
      return failed();
    *bound = address;
    return {};
  }
  Addresses found;
  Result result = resolve(address, true, &found);
  if (!result.ok()) return result;
  *descriptor = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int on = 1;
  setsockopt(*descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(*descriptor, found->ai_addr, found->ai_addrlen) != 0 || ::listen(*descriptor, 64) != 0) return failed();
  sockaddr_storage at{};
  socklen_t size = sizeof at;
  getsockname(*descriptor, reinterpret_cast<sockaddr*>(&at), &size);
  *bound = name_of(at, size);
  return {};
}

}  // namespace hetkv::control
