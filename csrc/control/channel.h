// Bytes over one connected socket with deadlines (Channel), and authenticated records on top of it (Records):
// docs/control-channel.md, section Records.
#pragma once

#include <cstdint>
#include <string>

#include "control/keys.h"
#include "control/messages.h"
#include "control/result.h"

namespace hetkv::control {

// CLOCK_MONOTONIC in ms; a deadline of 0 is none.
std::int64_t now_ms();

// Owns a socket. One thread may read while another writes, and any may call `wake`.
class Channel {
 public:
  Channel() = default;
  Channel(int descriptor, std::string peer);
  ~Channel() { close(); }
  Channel(Channel&& other) noexcept { *this = std::move(other); }
  Channel& operator=(Channel&& other) noexcept;

  Result read(void* out, std::size_t bytes, std::int64_t deadline_ms, const char* what);
  Result write(const void* data, std::size_t bytes, std::int64_t deadline_ms);
  // The kernel ends the connection where the peer's host has not answered for about so long.
  void end_when_silent(std::int64_t ms);
  void wake();    // both directions end: who reads or writes returns
  int release();  // the descriptor, which is the caller's from now on
  void close();
  int descriptor() const { return descriptor_; }
  const std::string& peer() const { return peer_; }

 private:
  Result wait(short event, std::int64_t deadline_ms, const char* what);
  int descriptor_ = -1;
  std::string peer_;
};

// Reads and writes are each for one thread at a time.
class Records {
 public:
  Records() = default;
  Records(const Hash& send_key, const Hash& receive_key) : send_key_(send_key), receive_key_(receive_key) {}
  Result write(Channel& channel, const Bytes& payload, std::int64_t deadline_ms);
  Result read(Channel& channel, Message* out, std::int64_t deadline_ms, const char* what);

 private:
  Hash send_key_{};
  Hash receive_key_{};
  std::uint64_t sent_ = 0;
  std::uint64_t received_ = 0;
};

// A connected or listening socket of `host:port`, or of a unix socket's name ("@name": without a file).
Result dial(const std::string& address, std::int64_t deadline_ms, Channel* out);
Result listen_at(const std::string& address, int* descriptor, std::string* bound);

}  // namespace hetkv::control
