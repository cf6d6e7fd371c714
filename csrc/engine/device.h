// A device of a backend as the engine uses it: statuses instead of codes, owners instead of pointers. Thread safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "status.h"

namespace hetkv::engine {

class Device;

// A point in a stream's order. Its handle goes back to the device's stock with the object, which does not wait for it.
class DeviceEvent {
 public:
  DeviceEvent(std::shared_ptr<Device> device, void* handle, bool timed)
      : device_(std::move(device)), handle_(handle), timed_(timed) {}
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  // All work before it has ended. Also true, with an error in `status`, where the device has failed: no work runs then.
  bool happened(Status* status = nullptr);
  void* handle() const { return handle_; }

 private:
  const std::shared_ptr<Device> device_;
  void* const handle_;
  const bool timed_;
  bool happened_ = false;
};

// Null stands for something that has happened.
using After = std::shared_ptr<DeviceEvent>;

class Device : public std::enable_shared_from_this<Device> {
 public:
  // kDevice where there is no such device.
  static Status open(const HetkvBackend& backend, int index, std::shared_ptr<Device>* out);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const HetkvBackend& backend() const { return backend_; }
  int index() const { return index_; }
  const HetkvDeviceInfo& info() const { return info_; }
  bool can(HetkvCapability capability) const { return (info_.capabilities & capability) != 0; }
  // kOk, or kDevice with what was tried, the device and the backend's own text.
  Status check(std::int32_t status, const std::string& what) const;

  // kInvalid: a stream of another device, or one that captures a graph.
  Status check_caller(void* stream) const;
  // A point after all that `stream`, checked so, holds now.
  Status record_caller(void* stream, After* out);
  // The same for the engine's own streams; `timed` ones can be subtracted.
  Status record(void* stream, bool timed, After* out);

 private:
  friend class DeviceEvent;
  Device(const HetkvBackend& backend, int index) : backend_(backend), index_(index) {}
  Status take_event(bool timed, void** handle);
  void return_event(bool timed, void* handle) noexcept;

  const HetkvBackend& backend_;
  const int index_;
  HetkvDeviceInfo info_{};
  std::mutex mutex_;
  std::vector<void*> events_[2];  // unused: untimed, timed
};

// Memory of a device, or pinned host memory that all devices of its backend see. Freed with the object, or as soon as
// no stream of the process waits for the host (frees.h): the owner has seen the last use of it end.
class DeviceBuffer {
 public:
  static Status device(std::shared_ptr<Device> device, std::size_t bytes, std::unique_ptr<DeviceBuffer>* out);
  static Status pinned(std::shared_ptr<Device> device, std::size_t bytes, std::unique_ptr<DeviceBuffer>* out);
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(data_); }

 private:
  DeviceBuffer(std::shared_ptr<Device> device, void* data, bool pinned)
      : device_(std::move(device)), data_(data), pinned_(pinned) {}
  const std::shared_ptr<Device> device_;
  void* const data_;
  const bool pinned_;
};

// Host memory of another owner, as a device's kernels may use it while this object lives.
class HostMapping {
 public:
  // `backing` keeps the memory mapped; it is held until the driver has let go of the memory.
  static Status map(std::shared_ptr<Device> device, std::uint64_t address, std::size_t bytes,
                    std::shared_ptr<const void> backing, std::unique_ptr<HostMapping>* out);
  ~HostMapping();
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  std::uint64_t address() const { return device_address_; }

 private:
  HostMapping(std::shared_ptr<Device> device, std::shared_ptr<const void> backing)
      : device_(std::move(device)), backing_(std::move(backing)) {}
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<const void> backing_;
  void* registered_ = nullptr;  // null: it was pinned before
  std::uint64_t device_address_ = 0;
};

// Keeps the calls of this thread out of graphs that other threads capture, while it lives.
class CaptureGuard {
 public:
  explicit CaptureGuard(const Device& device);
  ~CaptureGuard();
  CaptureGuard(const CaptureGuard&) = delete;
  CaptureGuard& operator=(const CaptureGuard&) = delete;

 private:
  const Device& device_;
  std::int32_t previous_ = 0;
  bool changed_ = false;
};

}  // namespace hetkv::engine
