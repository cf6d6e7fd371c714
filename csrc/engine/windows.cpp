#include "engine/windows.h"

#include <map>
#include <mutex>
#include <string>

#include "engine/frees.h"

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

transport::MemoryKind memory_kind(const HetkvBackend& backend) {
  return std::string(backend.name) == "hip" ? transport::MemoryKind::kRocm : transport::MemoryKind::kCuda;
}

}  // namespace

Status OwnWindow::make(transport::Transport& transport, const std::shared_ptr<Device>& device, Where where,
                       std::size_t bytes, std::unique_ptr<OwnWindow>* out) {
  std::unique_ptr<OwnWindow> self(new OwnWindow);
  self->where_ = where;
  self->bytes_ = bytes;
  if (where == Where::kDevice) {
    if (auto status = self->make_device(transport, device); !status.ok()) return status;
  } else {
    if (auto status = transport.allocate(bytes, &self->memory_); !status.ok()) return status;
    self->address_ = self->local_ = self->memory_->address();
    if (device != nullptr) {
      if (auto status = HostMapping::map(device, self->address_, bytes, self->memory_->backing(), &self->mapping_);
          !status.ok()) {
        return status;
      }
      self->local_ = self->mapping_->address();
    }
  }
  *out = std::move(self);
  return {};
}

Status OwnWindow::make_device(transport::Transport& transport, const std::shared_ptr<Device>& device) {
  if (auto status = DeviceBuffer::device(device, bytes_, &buffer_); !status.ok()) return status;
  address_ = local_ = buffer_->address();
  const HetkvBackend& backend = device->backend();
  DeviceWindowKey& key = key_.emplace();
  key.process = this_process();
  key.backend = backend.name;
  key.device = static_cast<std::uint32_t>(device->index());
  if (device->can(kHetkvCapIpc) && backend.ipc_export(buffer_->data(), &key.handle) != kHetkvOk) key.handle = {};
  const transport::MemoryKind kind = memory_kind(backend);
  const bool reached = transport.reaches(kind) && transport.attach(address_, bytes_, kind, &memory_).ok();
  if (key.handle.length == 0 && !reached) {
    return Status::error(Code::kDevice, "neither the driver nor RDMA can give a window in device memory to a peer");
  }
  const std::lock_guard<std::mutex> lock(own_windows().mutex);
  own_windows().bytes[address_] = bytes_;
  return {};
}

OwnWindow::~OwnWindow() {
  if (where_ == Where::kHost) return;
  const std::lock_guard<std::mutex> lock(own_windows().mutex);
  own_windows().bytes.erase(address_);
}

Status OwnWindow::share(transport::Endpoint& peer, wire::SlotGrant* grant) const {
  if (!key_) return peer.share(*memory_, grant);
  DeviceWindowKey key = *key_;
  if (memory_ != nullptr) {
    if (auto status = peer.share(*memory_, grant); !status.ok()) return status;
    key.ucx = std::move(grant->rkey);
  }
  grant->address = address_;
  grant->rkey = encode_key(key);
  return {};
}

Where staging_for(const transport::Transport& transport, const Device* device, Where window, bool direct) {
  const bool reached = device != nullptr && (direct || transport.reaches(memory_kind(device->backend())));
  return window == Where::kDevice && reached ? Where::kDevice : Where::kHost;
}

Status PeerWindow::open(transport::Endpoint& endpoint, const std::shared_ptr<Device>& device,
                        const wire::SlotGrant& grant, bool direct, std::unique_ptr<PeerWindow>* out) {
  std::unique_ptr<PeerWindow> self(new PeerWindow);
  self->bytes_ = grant.bytes;
  if (is_device_key(grant.rkey)) {
    self->where_ = Where::kDevice;
    wire::SlotGrant inner = grant;
    if (auto status = self->open_device(direct ? device : nullptr, grant, &inner.rkey); !status.ok()) return status;
    if (!inner.rkey.empty()) {
      auto status = endpoint.open(inner, false, &self->remote_);
      if (!status.ok() && self->local_ == 0) return status;
      if (self->remote_ != nullptr && !self->remote_->rma()) self->remote_.reset();
    }
    if (self->local_ == 0 && self->remote_ == nullptr) return {};
  } else {
    auto status = endpoint.open(grant, direct, &self->remote_);
    if (!status.ok()) return status;
    self->local_ = self->remote_->local();
    if (self->local_ != 0 && device != nullptr) {
      // Where the driver does not take the mapping, the window is put into.
      const bool mapped =
          HostMapping::map(device, self->local_, grant.bytes, self->remote_->backing(), &self->mapping_).ok();
      self->local_ = mapped ? self->mapping_->address() : 0;
    }
  }
  *out = std::move(self);
  return {};
}

// Sets `local_` where this side's device can store into the window.
Status PeerWindow::open_device(const std::shared_ptr<Device>& device, const wire::SlotGrant& grant,
                               std::vector<std::uint8_t>* transport_key) {
  DeviceWindowKey key;
  if (auto status = decode_key(grant.rkey, &key); !status.ok()) return status;
  *transport_key = std::move(key.ucx);
  if (device == nullptr || key.backend != device->backend().name) return {};
  const HetkvBackend& backend = device->backend();
  if (key.process == this_process()) {  // a handle opens in other processes only
    if (!own_windows().holds(grant.address, grant.bytes)) {
      return Status::error(Code::kProtocol, "the peer granted memory that is no window of this process");
    }
    const auto owner = static_cast<std::int32_t>(key.device);
    if (owner == device->index() || backend.enable_peer(device->index(), owner) == kHetkvOk) local_ = grant.address;
    return {};
  }
  if (key.handle.length == 0) return {};
  if (key.handle.offset > key.handle.length || grant.bytes > key.handle.length - key.handle.offset) {
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
  free_when_no_stream_waits([device = device_, handle = handle_, opened = opened_] {
    const CaptureGuard guard(*device);
    static_cast<void>(device->backend().ipc_close(device->index(), &handle, opened));
  });
}

}  // namespace hetkv::engine
