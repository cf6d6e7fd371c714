// The transport of every link: messages, and payloads that nobody can store, as authenticated frames on sockets that
// the control channel has connected (a unix socket between processes of one host, otherwise TCP). Over a unix socket
// slots go as descriptors, so that a sender stores into them. Where both sides have RDMA and ask for it, payloads are
// put through UCX instead (transport/rma.h).
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "transport/rma.h"
#include "transport/transport.h"

namespace hetkv::transport {

class StreamEndpoint;
class Stream;

class StreamTransport final : public Transport {
 public:
  // `rma`: null where there is none.
  StreamTransport(std::shared_ptr<const Clock> clock, std::unique_ptr<Rma> rma);
  ~StreamTransport() override;
  StreamTransport(const StreamTransport&) = delete;
  StreamTransport& operator=(const StreamTransport&) = delete;

  Status start(Sink* sink) override;
  void close() override;
  const std::vector<std::uint8_t>& address() const override { return address_; }
  Status connect(const PeerAddress& peer, std::unique_ptr<Endpoint>* out) override;
  bool progress() override;
  bool more() const override { return more_ || rma_ != nullptr; }
  bool arm() override { return rma_ == nullptr || rma_->arm(); }
  int event_fd() const override { return poll_fd_; }
  Status allocate(std::size_t bytes, std::unique_ptr<Memory>* out) override;
  bool reaches(MemoryKind kind) const override { return rma_ != nullptr && rma_->reaches(kind); }
  Status attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<Memory>* out) override;

 private:
  friend class StreamEndpoint;
  Status watch(StreamEndpoint& endpoint, Stream& stream);
  void update(Stream& stream);
  void forget(Stream& stream);

  const std::shared_ptr<const Clock> clock_;
  const std::unique_ptr<Rma> rma_;
  const std::vector<std::uint8_t> address_;
  Sink* sink_ = nullptr;
  int poll_fd_ = -1;
  std::uint64_t next_tag_ = 1;
  bool more_ = false;
  std::unordered_map<std::uint64_t, std::pair<StreamEndpoint*, Stream*>> streams_;  // by tag
};

}  // namespace hetkv::transport
