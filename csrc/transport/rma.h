// One-sided puts into a peer's memory by UCX, on transports that really have them (RDMA): never on a lane where UCX
// would emulate them, as a stranger could then write anywhere (docs/decisions/0012-own-streams.md). UCX is loaded at
// run time, and only where a node asks for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "status.h"
#include "transport/transport.h"

namespace hetkv::transport {

// Registered memory, with the key that a peer opens it by. Destroyed before the memory is freed.
class RmaMemory {
 public:
  virtual ~RmaMemory() = default;
  std::vector<std::uint8_t> key;
};

// A peer's memory. Destroyed before its endpoint.
class RmaTarget {
 public:
  virtual ~RmaTarget() = default;
};

class RmaEndpoint {
 public:
  virtual ~RmaEndpoint() = default;
  virtual Status open(const std::vector<std::uint8_t>& key, std::uint64_t address, std::unique_ptr<RmaTarget>* out) = 0;
  // `op` is done when the bytes are in the peer's memory.
  virtual void put(const void* source, std::size_t bytes, const RmaTarget& target, Op* op) = 0;
  virtual void close() = 0;
  virtual bool closed() const = 0;
  virtual const Status& failure() const = 0;
};

class Rma {
 public:
  virtual ~Rma() = default;
  virtual const std::vector<std::uint8_t>& address() const = 0;
  virtual int event_fd() const = 0;
  virtual bool progress() = 0;
  virtual bool arm() = 0;
  virtual void close() = 0;
  virtual bool reaches(MemoryKind kind) const = 0;
  virtual Status attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<RmaMemory>* out) = 0;
  // kTransport: the peer cannot be reached on such transports alone.
  virtual Status connect(const std::vector<std::uint8_t>& address, std::unique_ptr<RmaEndpoint>* out) = 0;
};

// The transports that puts are done on, as UCX_TLS names them; and those that a GPU's memory needs in addition.
constexpr char kRmaTransports[] = "rc,dc,cuda_copy,rocm_copy";

// kTransport: UCX is not loaded, was not there when hetkv was built, or has no such transport here.
Status open_rma(const std::string& transports, std::unique_ptr<Rma>* out);

}  // namespace hetkv::transport
