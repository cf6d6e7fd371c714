// A transport over UCX: one context and worker, endpoints, registered memory, one-sided puts, active messages. hetkv's
// own UCX configuration turns on error handling of the shared-memory transports
// (docs/decisions/0001-ucx-through-its-c-api.md).
#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <vector>

#include "transport/transport.h"

namespace hetkv::transport {

class UcxTransport final : public Transport {
 public:
  UcxTransport() = default;
  ~UcxTransport() override;
  UcxTransport(const UcxTransport&) = delete;
  UcxTransport& operator=(const UcxTransport&) = delete;

  Status start(Sink* sink) override;
  void close() override;
  const std::vector<std::uint8_t>& address() const override { return address_; }
  Status connect(const PeerAddress& peer, std::unique_ptr<Endpoint>* out) override;
  bool progress() override { return ucp_worker_progress(worker_) != 0; }
  bool arm() override { return ucp_worker_arm(worker_) == UCS_OK; }
  int event_fd() const override { return event_fd_; }
  Status allocate(std::size_t bytes, std::unique_ptr<Memory>* out) override;
  bool reaches(MemoryKind kind) const override;
  Status attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<Memory>* out) override;

 private:
  static ucs_status_t on_message(void* self, const void* header, std::size_t header_size, void* data, std::size_t size,
                                 const ucp_am_recv_param_t* param);
  Sink* sink_ = nullptr;
  std::shared_ptr<ucp_context> context_;  // ended with the last of those that need it
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::vector<std::uint8_t> address_;
};

}  // namespace hetkv::transport
