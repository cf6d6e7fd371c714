// Functions of the backend's table about devices.
#include <cstdio>

#include "backend/gpu/functions.h"
#include "backend/gpu/status.h"

namespace hetkv::gpu {

std::int32_t device_count(std::int32_t* count) {
  int found = 0;
  const gpuError_t error = gpuGetDeviceCount(&found);
  *count = 0;
  if (error == gpuErrorNoDevice) {
    forget();
    return kHetkvOk;
  }
  const std::int32_t status = report(error, "looking for devices");
  if (status == kHetkvOk) *count = found;
  return status;
}

std::int32_t device_info(std::int32_t device, HetkvDeviceInfo* info) {
  *info = HetkvDeviceInfo{};
  gpuDeviceProp properties;
  HETKV_TRY(gpuGetDeviceProperties(&properties, device));
  std::snprintf(info->name, sizeof info->name, "%.*s", static_cast<int>(sizeof info->name) - 1, properties.name);
  vendor::arch_name(properties, info->arch, sizeof info->arch);
  HETKV_TRY(gpuDeviceGetPCIBusId(info->pci_bus_id, sizeof info->pci_bus_id, device));
  vendor::uuid(properties, info->uuid);
  info->total_memory = properties.totalGlobalMem;
  info->l2_bytes = static_cast<std::uint64_t>(properties.l2CacheSize);
  info->multiprocessors = properties.multiProcessorCount;
  info->capabilities = vendor::capabilities(device);
  HETKV_TRY(gpuDriverGetVersion(&info->driver_version));
  info->runtime_version = HETKV_RUNTIME_VERSION;
  info->stream_queues = vendor::stream_queues();
  return kHetkvOk;
}

std::int32_t memory_info(std::int32_t device, std::uint64_t* free_bytes, std::uint64_t* total_bytes) {
  HETKV_ON(device);
  std::size_t free_now = 0, total = 0;
  HETKV_TRY(gpuMemGetInfo(&free_now, &total));
  *free_bytes = free_now;
  *total_bytes = total;
  return kHetkvOk;
}

std::int32_t can_access_peer(std::int32_t device, std::int32_t peer, std::int32_t* can) {
  int answer = 0;
  HETKV_TRY(gpuDeviceCanAccessPeer(&answer, device, peer));
  *can = answer;
  return kHetkvOk;
}

std::int32_t enable_peer(std::int32_t device, std::int32_t peer) {
  if (device == peer) return kHetkvOk;
  HETKV_ON(device);
  const gpuError_t error = gpuDeviceEnablePeerAccess(peer, 0);
  if (error == gpuErrorPeerAccessAlreadyEnabled) {
    forget();
    return kHetkvOk;
  }
  HETKV_TRY(error);
  return kHetkvOk;
}

std::int32_t bind_thread(std::int32_t device) {
  HETKV_TRY(gpuSetDevice(device));
  HETKV_TRY(gpuFree(nullptr));  // makes the device's context, which setting it alone may leave for later
  return kHetkvOk;
}

}  // namespace hetkv::gpu
