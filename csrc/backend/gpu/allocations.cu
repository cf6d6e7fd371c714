// Functions of the backend's table about memory: this process's, and that of another one on this host.
#include <cstring>
#include <mutex>
#include <set>

#include "backend/gpu/functions.h"
#include "backend/gpu/status.h"

namespace hetkv::gpu {
namespace {

// What this backend has registered: memory that others registered, such as UCX, they must unregister.
std::mutex registered_mutex;
std::set<const void*> registered;

}  // namespace

std::int32_t pointer_info(const void* pointer, HetkvPointerInfo* info) {
  *info = HetkvPointerInfo{};
  info->device = -1;
  gpuPointerAttributes found;
  if (gpuPointerGetAttributes(&found, pointer) != gpuSuccess) {
    forget();  // HIP's way to say that it does not know the pointer
    return kHetkvOk;
  }
  const bool managed = vendor::is_managed(found);
  if (!managed && !vendor::is_pinned(found) && !vendor::is_device(found)) return kHetkvOk;
  info->kind = managed ? kHetkvMemoryManaged : vendor::is_device(found) ? kHetkvMemoryDevice : kHetkvMemoryPinned;
  info->device = found.device;
  info->device_pointer = reinterpret_cast<std::uintptr_t>(found.devicePointer);
  if (info->kind != kHetkvMemoryDevice) return kHetkvOk;
  HETKV_ON(found.device);
  if (vendor::address_range(pointer, &info->base, &info->bytes)) info->ipc = vendor::has_ipc_handle(pointer) ? 1 : 0;
  forget();
  return kHetkvOk;
}

std::int32_t device_alloc(std::int32_t device, std::size_t bytes, void** pointer) {
  HETKV_ON(device);
  const gpuError_t error = gpuMalloc(pointer, bytes);
  if (error != gpuErrorMemoryAllocation) return report(error, "allocating device memory");
  forget();
  std::size_t free_now = 0, total = 0;
  static_cast<void>(gpuMemGetInfo(&free_now, &total));
  return fail(kHetkvOutOfMemory, "%s:%d has no room for %zu MiB: %zu of %zu MiB are free", HETKV_VENDOR, device,
              bytes >> 20, free_now >> 20, total >> 20);
}

std::int32_t device_free(std::int32_t device, void* pointer) {
  HETKV_ON(device);
  HETKV_TRY(gpuFree(pointer));
  return kHetkvOk;
}

std::int32_t host_alloc(std::size_t bytes, void** pointer) {
  const gpuError_t error = gpuHostAlloc(pointer, bytes, gpuHostAllocPortable | gpuHostAllocMapped);
  if (error != gpuErrorMemoryAllocation) return report(error, "allocating pinned memory");
  forget();
  return fail(kHetkvOutOfMemory, "no room for %zu MiB of pinned host memory", bytes >> 20);
}

std::int32_t host_free(void* pointer) {
  HETKV_TRY(gpuHostFree(pointer));
  return kHetkvOk;
}

std::int32_t host_register(std::int32_t device, void* pointer, std::size_t bytes, void** device_pointer) {
  HETKV_ON(device);
  const std::lock_guard<std::mutex> lock(registered_mutex);
  const gpuError_t error = gpuHostRegister(pointer, bytes, gpuHostRegisterPortable | gpuHostRegisterMapped);
  if (error == gpuErrorHostMemoryAlreadyRegistered) {
    forget();
  } else {
    HETKV_TRY(error);
    registered.insert(pointer);
  }
  HETKV_TRY(gpuHostGetDevicePointer(device_pointer, pointer, 0));
  return kHetkvOk;
}

std::int32_t host_unregister(void* pointer) {
  const std::lock_guard<std::mutex> lock(registered_mutex);
  if (registered.erase(pointer) == 0) return kHetkvOk;
  HETKV_TRY(gpuHostUnregister(pointer));
  return kHetkvOk;
}

// --- memory of another process ---

static_assert(sizeof(gpuIpcMemHandle_t) == sizeof HetkvIpcHandle{}.bytes, "legacy IPC handles have 64 bytes");

std::int32_t ipc_export(const void* pointer, HetkvIpcHandle* handle) {
  HetkvPointerInfo info;
  const std::int32_t status = pointer_info(pointer, &info);
  if (status != kHetkvOk) return status;
  if (info.kind != kHetkvMemoryDevice) return fail(kHetkvInvalid, "%p is not device memory", pointer);
  if (info.ipc == 0) return fail(kHetkvUnsupported, "the memory at %p has no legacy IPC handle", pointer);
  HETKV_ON(info.device);
  gpuIpcMemHandle_t raw{};
  HETKV_TRY(gpuIpcGetMemHandle(&raw, reinterpret_cast<void*>(info.base)));
  std::memcpy(handle->bytes, &raw, sizeof raw);
  handle->offset = reinterpret_cast<std::uintptr_t>(pointer) - info.base;
  handle->length = info.bytes;
  return kHetkvOk;
}

std::int32_t ipc_open(std::int32_t device, const HetkvIpcHandle* handle, void** pointer) {
  HETKV_ON(device);
  gpuIpcMemHandle_t raw;
  std::memcpy(&raw, handle->bytes, sizeof raw);
  void* base = nullptr;
  HETKV_TRY(gpuIpcOpenMemHandle(&base, raw, gpuIpcMemLazyEnablePeerAccess));
  *pointer = static_cast<std::uint8_t*>(base) + handle->offset;
  return kHetkvOk;
}

std::int32_t ipc_close(std::int32_t device, const HetkvIpcHandle* handle, void* pointer) {
  HETKV_ON(device);
  HETKV_TRY(gpuIpcCloseMemHandle(static_cast<std::uint8_t*>(pointer) - handle->offset));
  return kHetkvOk;
}

}  // namespace hetkv::gpu
