// Host memory that can be given to another process of this host as a descriptor: a memfd, sealed so that nobody can
// change its size under a mapping.
#pragma once

#include <memory>

#include "transport/transport.h"

namespace hetkv::transport {

class SharedMemory final : public Memory {
 public:
  static Status allocate(std::size_t bytes, std::unique_ptr<SharedMemory>* out);
  ~SharedMemory() override;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  int descriptor() const { return descriptor_; }

 private:
  SharedMemory() = default;
  int descriptor_ = -1;
};

// A mapping of another process's shared memory.
class Mapping {
 public:
  // Takes the descriptor over. kProtocol: it is no sealed memory of that size.
  static Status open(int descriptor, std::size_t bytes, std::unique_ptr<Mapping>* out);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::uint64_t address() const { return address_; }

 private:
  Mapping() = default;
  std::uint64_t address_ = 0;
  std::size_t bytes_ = 0;
};

}  // namespace hetkv::transport
