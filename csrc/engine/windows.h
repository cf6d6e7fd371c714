// Memory that payloads pass through: this side's own (a receiver's slots, a sender's staging buffers), and a peer's
// slots as this side reaches them. In host memory, or in a device's. Progress thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/device.h"
#include "engine/window_key.h"
#include "transport/transport.h"

namespace hetkv::engine {

enum class Where : std::uint8_t { kHost = 0, kDevice = 1 };

// How payloads get into a window.
enum class Path : std::uint8_t {
  kNone = 0,    // no window yet
  kRma = 1,     // packed into staging, put from there by RDMA
  kShm = 2,     // packed straight into host memory that both sides map
  kDevice = 3,  // packed straight into the memory of a device
  kStream = 4,  // packed into staging, sent from there
};

// One slot or staging buffer, an allocation of its own, known to the transport and mapped for the pool's device.
class OwnWindow {
 public:
  // `device`: the pool's, or null for a pool in host memory, which has windows there only.
  static Status make(transport::Transport& transport, const std::shared_ptr<Device>& device, Where where,
                     std::size_t bytes, std::unique_ptr<OwnWindow>* out);
  ~OwnWindow();
  OwnWindow(const OwnWindow&) = delete;
  OwnWindow& operator=(const OwnWindow&) = delete;

  // A peer's kernels or copies may still store into it, and no driver waits for them when it frees memory: device
  // memory stays allocated until this process ends. Host memory needs no such care, as the peer's mapping keeps it.
  void abandon() { static_cast<void>(buffer_.release()); }

  Where where() const { return where_; }
  std::size_t bytes() const { return bytes_; }
  std::uint64_t address() const { return address_; }  // as the peer names it
  std::uint64_t local() const { return local_; }      // as this side's remaps use it
  // Lets a peer reach it: fills in the grant's key, and its address where that is needed.
  Status share(transport::Endpoint& peer, wire::SlotGrant* grant) const;

 private:
  OwnWindow() = default;
  Status make_device(transport::Transport& transport, const std::shared_ptr<Device>& device);
  Where where_ = Where::kHost;
  std::size_t bytes_ = 0;
  std::uint64_t address_ = 0;
  std::uint64_t local_ = 0;
  std::optional<DeviceWindowKey> key_;  // of device memory
  // In this order, so that the registrations go before the memory.
  std::unique_ptr<DeviceBuffer> buffer_;
  std::unique_ptr<transport::Memory> memory_;
  std::unique_ptr<HostMapping> mapping_;
};

// Where a sender's staging must be for such a window: where the transport can put from, or, with `direct`, where the
// device copies from. `device` may be null.
Where staging_for(const transport::Transport& transport, const Device* device, Where window, bool direct);

// A peer's slot. Destroyed before its endpoint, and after the last store into it.
class PeerWindow {
 public:
  // `direct`: store into it where that is possible; otherwise it is put into. Null, without an error:
  // this side can do neither.
  static Status open(transport::Endpoint& endpoint, const std::shared_ptr<Device>& device, const wire::SlotGrant& grant,
                     bool direct, std::unique_ptr<PeerWindow>* out);
  ~PeerWindow();
  PeerWindow(const PeerWindow&) = delete;
  PeerWindow& operator=(const PeerWindow&) = delete;

  Where where() const { return where_; }
  std::size_t bytes() const { return bytes_; }
  Path path() const {
    if (local_ == 0) return remote_ != nullptr && remote_->rma() ? Path::kRma : Path::kStream;
    return where_ == Where::kHost ? Path::kShm : Path::kDevice;
  }
  std::uint64_t local() const { return local_; }  // where this side's remaps store; 0 where it is put into
  const transport::PeerMemory& remote() const { return *remote_; }

 private:
  PeerWindow() = default;
  Status open_device(const std::shared_ptr<Device>& device, const wire::SlotGrant& grant,
                     std::vector<std::uint8_t>* transport_key);
  Where where_ = Where::kHost;
  std::size_t bytes_ = 0;
  std::uint64_t local_ = 0;
  std::unique_ptr<transport::PeerMemory> remote_;  // null where the transport does not reach the window
  std::unique_ptr<HostMapping> mapping_;
  std::shared_ptr<Device> device_;  // of `opened_`
  HetkvIpcHandle handle_{};
  void* opened_ = nullptr;
};

}  // namespace hetkv::engine
