#include "transport/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace hetkv::transport {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

Status failed(const char* what) {
  return Status::error(Code::kTransport, std::string("shared memory: ") + what + ": " + std::strerror(errno));
}

void* map(int descriptor, std::size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor, 0);
  return data == MAP_FAILED ? nullptr : data;
}

}  // namespace

Status SharedMemory::allocate(std::size_t bytes, std::unique_ptr<SharedMemory>* out) {
  std::unique_ptr<SharedMemory> self(new SharedMemory);
  self->descriptor_ = memfd_create("hetkv-window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (self->descriptor_ < 0) return failed("memfd_create");
  if (ftruncate(self->descriptor_, static_cast<off_t>(bytes)) != 0) return failed("ftruncate");
  if (fcntl(self->descriptor_, F_ADD_SEALS, kSeals) != 0) return failed("sealing");
  void* data = map(self->descriptor_, bytes);
  if (data == nullptr) return failed("mmap");
  self->address_ = reinterpret_cast<std::uint64_t>(data);
  self->bytes_ = bytes;
  *out = std::move(self);
  return {};
}

SharedMemory::~SharedMemory() {
  if (address_ != 0) munmap(reinterpret_cast<void*>(address_), bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

Status Mapping::open(int descriptor, std::size_t bytes, std::unique_ptr<Mapping>* out) {
  struct stat found{};
  const bool sized = fstat(descriptor, &found) == 0 && static_cast<std::size_t>(found.st_size) == bytes;
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (!sized || seals < 0 || (seals & kSeals) != kSeals) {
    close(descriptor);
    return Status::error(Code::kProtocol,
                         "the peer granted memory that is not sealed, or of another size than it says");
  }
  void* data = map(descriptor, bytes);
  const auto status = data == nullptr ? failed("mapping the peer's window") : Status{};
  close(descriptor);
  if (data == nullptr) return status;
  std::unique_ptr<Mapping> self(new Mapping);
  self->address_ = reinterpret_cast<std::uint64_t>(data);
  self->bytes_ = bytes;
  *out = std::move(self);
  return {};
}

Mapping::~Mapping() {
  munmap(reinterpret_cast<void*>(address_), bytes_);
}

}  // namespace hetkv::transport
