// The part of UCX that hetkv uses: one context and worker per engine, endpoints, registered memory, one-sided puts,
// active messages. Every call except `address` and `event_fd` belongs to the engine's progress thread. hetkv's own UCX
// configuration turns on error handling of the shared-memory transports (docs/decisions/0001-ucx-through-its-c-api.md).
#pragma once

#include <ucp/api/ucp.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "status.h"

namespace hetkv::transport {

// One asynchronous operation. Must stay where it is until `done`.
struct Op {
  bool done = true;
  ucs_status_t status = UCS_OK;
};

// Called from Worker::progress for every active message: the link number of its header and the message, valid in the
// call.
using MessageHandler = std::function<void(std::uint64_t link, const std::uint8_t* data, std::size_t size)>;

class Worker;

// Ended with the last of those that need it: the worker and the memory registered through it.
using Context = std::shared_ptr<ucp_context>;

// Memory that a peer may put into, or that this side puts from. Deregistered, and freed where it was allocated here,
// with the object.
class Memory {
 public:
  // Host memory, an allocation of its own, that peers of this host can map where UCX has a way.
  static Status allocate(Worker& worker, std::size_t bytes, std::unique_ptr<Memory>* out);
  // Registers memory of the caller's, which outlives the object. Fails where UCX cannot reach that kind of memory.
  static Status map(Worker& worker, std::uint64_t address, std::size_t bytes, ucs_memory_type_t type,
                    std::unique_ptr<Memory>* out);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::uint64_t address() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  const std::vector<std::uint8_t>& rkey() const { return rkey_; }

 private:
  Memory() = default;
  Status pack_key();
  Context context_;
  ucp_mem_h handle_ = nullptr;
  std::uint64_t address_ = 0;
  std::size_t bytes_ = 0;
  std::vector<std::uint8_t> rkey_;
};

// A peer's memory as an endpoint reaches it. Destroy it before its endpoint.
class RemoteMemory {
 public:
  ~RemoteMemory();
  std::uint64_t address = 0;  // in the peer
  std::size_t bytes = 0;
  std::uint64_t local = 0;  // where this process may store into it directly; 0 where it cannot
  ucp_rkey_h key = nullptr;
};

class Endpoint {
 public:
  // `failed` is set when UCX reports an error of the peer.
  static Status connect(Worker& worker, const std::vector<std::uint8_t>& peer, std::unique_ptr<Endpoint>* out);
  ~Endpoint();
  Endpoint(const Endpoint&) = delete;
  Endpoint& operator=(const Endpoint&) = delete;

  // `map`: ask UCX for a local address too, which only host memory has.
  Status open(const std::vector<std::uint8_t>& rkey, std::uint64_t address, std::size_t bytes, bool map,
              std::unique_ptr<RemoteMemory>* out);
  // One-sided write of `bytes` at `source` to `offset` of `target`; `op` is done when `source` may be reused.
  void put(const void* source, std::size_t bytes, const RemoteMemory& target, std::size_t offset, Op* op);
  // `op` is done when all puts before it are visible in the peer's memory.
  void flush(Op* op);
  // Takes the message over; small ones leave at once.
  void send(std::uint64_t link, std::vector<std::uint8_t> message);
  // Cancels what is in flight; `closed()` turns true from Worker::progress once every op of this endpoint is done.
  void close();
  bool closed() const { return closing_ && close_.done; }
  bool failed() const { return failed_; }
  ucs_status_t failure() const { return failure_; }

 private:
  Endpoint() = default;
  ucp_ep_h handle_ = nullptr;
  bool failed_ = false;
  bool closing_ = false;
  ucs_status_t failure_ = UCS_OK;
  Op close_;
};

class Worker {
 public:
  static Status create(MessageHandler handler, std::unique_ptr<Worker>* out);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  const std::vector<std::uint8_t>& address() const { return address_; }
  int event_fd() const { return event_fd_; }
  // Ends all endpoints and operations. Idempotent.
  void close();
  bool progress() { return ucp_worker_progress(handle_) != 0; }
  // UCX can put from and into memory of this type.
  bool reaches(ucs_memory_type_t type) const;
  // True: nothing is pending and the event fd will wake; false: progress again before sleeping.
  bool arm() { return ucp_worker_arm(handle_) == UCS_OK; }
  ucp_worker_h handle() const { return handle_; }
  const Context& context() const { return context_; }

 private:
  Worker() = default;
  static ucs_status_t on_message(void* self, const void* header, std::size_t header_size, void* data, std::size_t size,
                                 const ucp_am_recv_param_t* param);
  Context context_;
  ucp_worker_h handle_ = nullptr;
  int event_fd_ = -1;
  std::vector<std::uint8_t> address_;
  MessageHandler handler_;
};

}  // namespace hetkv::transport
