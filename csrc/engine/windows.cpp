#include "engine/windows.h"

#include <map>
#include <mutex>

#include "engine/window_key.h"

namespace hetkv::engine {
namespace {

// Windows in device memory that this process owns: what one of its own senders may be granted without a handle.
struct OwnWindows {
  std::mutex mutex;
  std::map<std::uint64_t, std::size_t> bytes;  // by address

  bool holds(std::uint64_t address, std::size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = bytes.find(address);
    return found != bytes.end() && size <= found->second;
  }
};

OwnWindows& own_windows() {
  static OwnWindows windows;
  return windows;
}

ucs_memory_type_t memory_type(const HetkvBackend& backend) {
  return std::string(backend.name) == "hip" ? UCS_MEMORY_TYPE_ROCM : UCS_MEMORY_TYPE_CUDA;
}

}  // namespace

Status OwnWindow::make(transport::Worker& worker, const std::shared_ptr<Device>& device, Where where, std::size_t bytes,
                       std::unique_ptr<OwnWindow>* out) {
  std::unique_ptr<OwnWindow> self(new OwnWindow);
  self->where_ = where;
  self->bytes_ = bytes;
  if (where == Where::kDevice) {
    if (auto status = self->make_device(worker, device); !status.ok()) return status;
  } else {
    if (auto status = transport::Memory::allocate(worker, bytes, &self->memory_); !status.ok()) return status;
    self->key_ = self->memory_->rkey();
    self->address_ = self->local_ = self->memory_->address();
    if (device != nullptr) {
      if (auto status = HostMapping::map(device, self->address_, bytes, &self->mapping_); !status.ok()) return status;
      self->local_ = self->mapping_->address();
    }
  }
  *out = std::move(self);
  return {};
}

Status OwnWindow::make_device(transport::Worker& worker, const std::shared_ptr<Device>& device) {
  if (auto status = DeviceBuffer::device(device, bytes_, &buffer_); !status.ok()) return status;
  address_ = local_ = buffer_->address();
  const HetkvBackend& backend = device->backend();
  DeviceWindowKey key;
  key.process = this_process();
  key.backend = backend.name;
  key.device = static_cast<std::uint32_t>(device->index());
  if (device->can(kHetkvCapIpc) && backend.ipc_export(buffer_->data(), &key.handle) != kHetkvOk) key.handle = {};
  const ucs_memory_type_t type = memory_type(backend);
  if (worker.reaches(type) && transport::Memory::map(worker, address_, bytes_, type, &memory_).ok()) {
    key.ucx = memory_->rkey();
  }
  if (key.handle.length == 0 && key.ucx.empty()) {
    return Status::error(Code::kDevice, "neither the driver nor UCX can give a window in device memory to a peer");
  }
  key_ = encode_key(key);
  const std::lock_guard<std::mutex> lock(own_windows().mutex);
  own_windows().bytes[address_] = bytes_;
  return {};
}

OwnWindow::~OwnWindow() {
  if (where_ == Where::kHost) return;
  const std::lock_guard<std::mutex> lock(own_windows().mutex);
  own_windows().bytes.erase(address_);
}

Where staging_for(const transport::Worker& worker, const Device* device, Where window, bool direct) {
  const bool reached = device != nullptr && (direct || worker.reaches(memory_type(device->backend())));
  return window == Where::kDevice && reached ? Where::kDevice : Where::kHost;
}

Status PeerWindow::open(transport::Endpoint& endpoint, const std::shared_ptr<Device>& device,
                        const std::vector<std::uint8_t>& key, std::uint64_t address, std::size_t bytes, bool direct,
                        std::unique_ptr<PeerWindow>* out) {
  std::unique_ptr<PeerWindow> self(new PeerWindow);
  self->bytes_ = bytes;
  if (is_device_key(key)) {
    self->where_ = Where::kDevice;
    std::vector<std::uint8_t> ucx_key;
    if (auto status = self->open_device(direct ? device : nullptr, key, address, bytes, &ucx_key); !status.ok()) {
      return status;
    }
    if (!ucx_key.empty()) {
      auto status = endpoint.open(ucx_key, address, bytes, false, &self->remote_);
      if (!status.ok() && self->local_ == 0) return status;
    } else if (self->local_ == 0) {
      return Status::error(Code::kTransport,
                           "the peer's window lies in device memory that this side cannot store into and UCX cannot "
                           "reach: let the receiver keep its windows in host memory (window=\"host\")");
    }
  } else {
    if (auto status = endpoint.open(key, address, bytes, true, &self->remote_); !status.ok()) return status;
    self->local_ = direct ? self->remote_->local : 0;
    if (self->local_ != 0 && device != nullptr) {
      // Where the driver does not take the mapping, the window is put into.
      const bool mapped = HostMapping::map(device, self->local_, bytes, &self->mapping_).ok();
      self->local_ = mapped ? self->mapping_->address() : 0;
    }
  }
  *out = std::move(self);
  return {};
}

// Sets `local_` where this side's device can store into the window.
Status PeerWindow::open_device(const std::shared_ptr<Device>& device, const std::vector<std::uint8_t>& bytes_of_key,
                               std::uint64_t address, std::size_t bytes, std::vector<std::uint8_t>* ucx_key) {
  DeviceWindowKey key;
  if (auto status = decode_key(bytes_of_key, &key); !status.ok()) return status;
  *ucx_key = std::move(key.ucx);
  if (device == nullptr || key.backend != device->backend().name) return {};
  const HetkvBackend& backend = device->backend();
  if (key.process == this_process()) {  // a handle opens in other processes only
    if (!own_windows().holds(address, bytes)) {
      return Status::error(Code::kProtocol, "the peer granted memory that is no window of this process");
    }
    const auto owner = static_cast<std::int32_t>(key.device);
    if (owner == device->index() || backend.enable_peer(device->index(), owner) == kHetkvOk) local_ = address;
    return {};
  }
  if (key.handle.length == 0) return {};
  if (key.handle.offset > key.handle.length || bytes > key.handle.length - key.handle.offset) {
    return Status::error(Code::kProtocol, "the peer granted more device memory than its handle opens");
  }
  void* opened = nullptr;
  if (backend.ipc_open(device->index(), &key.handle, &opened) != kHetkvOk) return {};
  device_ = device;
  handle_ = key.handle;
  opened_ = opened;
  local_ = reinterpret_cast<std::uint64_t>(opened);
  return {};
}

PeerWindow::~PeerWindow() {
  if (opened_ == nullptr) return;
  const CaptureGuard guard(*device_);
  static_cast<void>(device_->backend().ipc_close(device_->index(), &handle_, opened_));
}

}  // namespace hetkv::engine
