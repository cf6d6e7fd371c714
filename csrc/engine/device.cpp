#include "engine/device.h"

#include "engine/frees.h"

namespace hetkv::engine {

DeviceEvent::~DeviceEvent() {
  device_->return_event(timed_, handle_);
}

bool DeviceEvent::happened(Status* status) {
  if (happened_) return true;
  const std::int32_t found = device_->backend().event_query(handle_);
  if (found == kHetkvNotReady) return false;
  happened_ = found == kHetkvOk;
  if (!happened_ && status != nullptr) *status = device_->check(found, "waiting for a kernel");
  return true;
}

Status Device::open(const HetkvBackend& backend, int index, std::shared_ptr<Device>* out) {
  std::shared_ptr<Device> self(new Device(backend, index));
  if (auto status = self->check(backend.device_info(index, &self->info_), "opening"); !status.ok()) return status;
  *out = std::move(self);
  return {};
}

Device::~Device() {
  for (auto& stock : events_) {
    for (void* event : stock) static_cast<void>(backend_.event_destroy(event));
  }
}

Status Device::check(std::int32_t status, const std::string& what) const {
  if (status == kHetkvOk) return {};
  const char* text = status == kHetkvNotReady ? "not ready" : backend_.last_error();
  return Status::error(Code::kDevice, std::string(backend_.name) + ":" + std::to_string(index_) + ": " + what + ": " +
                                          (text != nullptr ? text : "no reason given"));
}

Status Device::check_caller(void* stream) const {
  const CaptureGuard guard(*this);
  std::int32_t capturing = 0;
  if (auto status = check(backend_.stream_is_capturing(index_, stream, &capturing), "looking at the stream");
      !status.ok()) {
    return status;
  }
  if (capturing != 0) {
    return Status::error(Code::kInvalid, "the stream captures a graph: what it holds runs only when that is launched");
  }
  std::int32_t of = index_;
  if (stream != nullptr && can(kHetkvCapStreamDevice)) {
    if (auto status = check(backend_.stream_device(stream, &of), "looking at the stream"); !status.ok()) return status;
  }
  if (of != index_) {
    return Status::error(Code::kInvalid, "the stream is one of device " + std::to_string(of) +
                                             ", the pool is on device " + std::to_string(index_));
  }
  return {};
}

Status Device::record_caller(void* stream, After* out) {
  const CaptureGuard guard(*this);
  auto status = check_caller(stream);
  return status.ok() ? record(stream, false, out) : status;
}

Status Device::record(void* stream, bool timed, After* out) {
  void* handle = nullptr;
  if (auto status = take_event(timed, &handle); !status.ok()) return status;
  auto event = std::make_shared<DeviceEvent>(shared_from_this(), handle, timed);
  if (auto status = check(backend_.event_record(index_, handle, stream), "recording an event"); !status.ok())
    return status;
  *out = std::move(event);
  return {};
}

Status Device::take_event(bool timed, void** handle) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& stock = events_[timed ? 1 : 0];
    if (!stock.empty()) {
      *handle = stock.back();
      stock.pop_back();
      return {};
    }
  }
  return check(backend_.event_create(index_, timed ? 1 : 0, handle), "making an event");
}

void Device::return_event(bool timed, void* handle) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  events_[timed ? 1 : 0].push_back(handle);
}

Status DeviceBuffer::device(std::shared_ptr<Device> device, std::size_t bytes, std::unique_ptr<DeviceBuffer>* out) {
  void* data = nullptr;
  auto status = device->check(device->backend().device_alloc(device->index(), bytes, &data),
                              "allocating " + std::to_string(bytes) + " bytes");
  if (status.ok()) out->reset(new DeviceBuffer(std::move(device), data, false));
  return status;
}

Status DeviceBuffer::pinned(std::shared_ptr<Device> device, std::size_t bytes, std::unique_ptr<DeviceBuffer>* out) {
  void* data = nullptr;
  auto status = device->check(device->backend().host_alloc(bytes, &data),
                              "allocating " + std::to_string(bytes) + " bytes of pinned host memory");
  if (status.ok()) out->reset(new DeviceBuffer(std::move(device), data, true));
  return status;
}

DeviceBuffer::~DeviceBuffer() {
  free_when_no_stream_waits([device = device_, data = data_, pinned = pinned_] {
    const CaptureGuard guard(*device);
    const HetkvBackend& backend = device->backend();
    static_cast<void>(pinned ? backend.host_free(data) : backend.device_free(device->index(), data));
  });
}

Status HostMapping::map(std::shared_ptr<Device> device, std::uint64_t address, std::size_t bytes,
                        std::shared_ptr<const void> backing, std::unique_ptr<HostMapping>* out) {
  std::unique_ptr<HostMapping> self(new HostMapping(std::move(device), std::move(backing)));
  const HetkvBackend& backend = self->device_->backend();
  auto* pointer = reinterpret_cast<void*>(address);
  HetkvPointerInfo info{};
  // UCX, or another node of this process, may have pinned it already.
  if (backend.pointer_info(pointer, &info) == kHetkvOk && info.kind == kHetkvMemoryPinned && info.device_pointer != 0) {
    self->device_address_ = info.device_pointer;
  } else {
    void* mapped = nullptr;
    if (auto status = self->device_->check(backend.host_register(self->device_->index(), pointer, bytes, &mapped),
                                           "pinning " + std::to_string(bytes) + " bytes of a window");
        !status.ok()) {
      return status;
    }
    self->registered_ = pointer;
    self->device_address_ = reinterpret_cast<std::uint64_t>(mapped);
  }
  *out = std::move(self);
  return {};
}

HostMapping::~HostMapping() {
  if (registered_ == nullptr) return;
  free_when_no_stream_waits([device = device_, backing = backing_, memory = registered_] {
    const CaptureGuard guard(*device);
    static_cast<void>(device->backend().host_unregister(memory));
  });
}

CaptureGuard::CaptureGuard(const Device& device) : device_(device) {
  changed_ = device.can(kHetkvCapRelaxedCapture) && device.backend().exchange_capture_mode(1, &previous_) == kHetkvOk;
}

CaptureGuard::~CaptureGuard() {
  std::int32_t ignored = 0;
  if (changed_) static_cast<void>(device_.backend().exchange_capture_mode(previous_, &ignored));
}

}  // namespace hetkv::engine
