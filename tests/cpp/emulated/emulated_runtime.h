// The vendor runtime of a GPU that does not exist: its memory is the host's, its streams run at once, and the kernels'
// own code runs thread by thread. So the backend, the kernels' indices and their conversions run on any machine.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "backend/backend.h"

#define HETKV_VENDOR "emulated"
#define HETKV_RUNTIME_VERSION 1000

using gpuError_t = int;
enum : int {
  gpuSuccess,
  gpuErrorNotReady,
  gpuErrorInvalidValue,
  gpuErrorMemoryAllocation,
  gpuErrorNoDevice,
  gpuErrorInsufficientDriver,
  gpuErrorInvalidDevice,
  gpuErrorNotSupported,
  gpuErrorPeerAccessAlreadyEnabled,
  gpuErrorHostMemoryAlreadyRegistered,
  gpuErrorInvalidResourceHandle,
};

constexpr int kEmulatedDevices = 2;
constexpr std::size_t kEmulatedMemory = std::size_t{1} << 30;

struct EmulatedStream {
  int device;
};
struct EmulatedEvent {
  int device;
};
using gpuStream_t = EmulatedStream*;
using gpuEvent_t = EmulatedEvent*;

struct EmulatedAllocation {
  std::size_t bytes;
  int device;
  std::int32_t kind;
};

struct EmulatedState {
  std::mutex mutex;
  std::map<std::uintptr_t, EmulatedAllocation> allocations;
  std::size_t used = 0;
};
inline EmulatedState& emulated() {
  static EmulatedState state;
  return state;
}
inline thread_local int emulated_device = 0;

inline const char* gpuGetErrorString(gpuError_t error) {
  if (error == gpuErrorInvalidDevice) return "invalid device ordinal";
  return error == gpuErrorNotSupported ? "not supported" : error == gpuErrorInvalidValue ? "invalid value" : "error";
}
inline gpuError_t gpuGetLastError() {
  return gpuSuccess;
}
inline gpuError_t gpuGetDeviceCount(int* count) {
  return *count = kEmulatedDevices, gpuSuccess;
}
inline gpuError_t gpuGetDevice(int* device) {
  return *device = emulated_device, gpuSuccess;
}
inline gpuError_t gpuSetDevice(int device) {
  if (device < 0 || device >= kEmulatedDevices) return gpuErrorInvalidDevice;
  emulated_device = device;
  return gpuSuccess;
}

struct gpuDeviceProp {
  const char* name = "emulated GPU";
  std::size_t totalGlobalMem = kEmulatedMemory;
  int l2CacheSize = 1 << 20;
  int multiProcessorCount = 3;
};
inline gpuError_t gpuGetDeviceProperties(gpuDeviceProp* properties, int device) {
  *properties = gpuDeviceProp{};
  return device < kEmulatedDevices ? gpuSuccess : gpuErrorInvalidDevice;
}
inline gpuError_t gpuDeviceGetPCIBusId(char* text, int size, int device) {
  return std::snprintf(text, static_cast<std::size_t>(size), "eeee:%02x:00.0", device), gpuSuccess;
}
inline gpuError_t gpuDriverGetVersion(int* version) {
  return *version = 1000, gpuSuccess;
}
inline gpuError_t gpuDeviceCanAccessPeer(int* can, int device, int peer) {
  return *can = device != peer, gpuSuccess;
}
inline gpuError_t gpuDeviceEnablePeerAccess(int, unsigned) {
  return gpuSuccess;
}
inline gpuError_t gpuDeviceGetAttribute(int* value, int, int) {
  return *value = 3, gpuSuccess;
}

inline gpuError_t emulated_alloc(void** pointer, std::size_t bytes, std::int32_t kind) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (kind == kHetkvMemoryDevice && state.used + bytes > kEmulatedMemory) return gpuErrorMemoryAllocation;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*pointer == nullptr) return gpuErrorMemoryAllocation;
  if (kind == kHetkvMemoryDevice) state.used += bytes;
  state.allocations[reinterpret_cast<std::uintptr_t>(*pointer)] = {bytes, emulated_device, kind};
  return gpuSuccess;
}
inline gpuError_t emulated_free(void* pointer) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto found = state.allocations.find(reinterpret_cast<std::uintptr_t>(pointer));
  if (found == state.allocations.end()) return gpuErrorInvalidValue;
  if (found->second.kind == kHetkvMemoryDevice) state.used -= found->second.bytes;
  state.allocations.erase(found);
  std::free(pointer);
  return gpuSuccess;
}
inline gpuError_t gpuMalloc(void** pointer, std::size_t bytes) {
  return emulated_alloc(pointer, bytes, kHetkvMemoryDevice);
}
inline gpuError_t gpuFree(void* pointer) {
  return emulated_free(pointer);
}
constexpr unsigned gpuHostAllocPortable = 1, gpuHostAllocMapped = 2;
inline gpuError_t gpuHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  return emulated_alloc(pointer, bytes, kHetkvMemoryPinned);
}
inline gpuError_t gpuHostFree(void* pointer) {
  return emulated_free(pointer);
}
inline gpuError_t gpuMemGetInfo(std::size_t* free_bytes, std::size_t* total) {
  *total = kEmulatedMemory;
  *free_bytes = kEmulatedMemory - emulated().used;
  return gpuSuccess;
}
constexpr unsigned gpuHostRegisterPortable = 1, gpuHostRegisterMapped = 2;
inline gpuError_t gpuHostRegister(void* pointer, std::size_t bytes, unsigned) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const EmulatedAllocation allocation{bytes, emulated_device, kHetkvMemoryPinned};
  const bool added = state.allocations.emplace(reinterpret_cast<std::uintptr_t>(pointer), allocation).second;
  return added ? gpuSuccess : gpuErrorHostMemoryAlreadyRegistered;
}
inline gpuError_t gpuHostUnregister(void* pointer) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  return state.allocations.erase(reinterpret_cast<std::uintptr_t>(pointer)) == 1 ? gpuSuccess : gpuErrorInvalidValue;
}
inline gpuError_t gpuHostGetDevicePointer(void** device_pointer, void* pointer, unsigned) {
  return *device_pointer = pointer, gpuSuccess;
}

struct gpuPointerAttributes {
  int device;
  void* devicePointer;
  std::int32_t kind;
};
inline gpuError_t gpuPointerGetAttributes(gpuPointerAttributes* found, const void* pointer) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto at = reinterpret_cast<std::uintptr_t>(pointer);
  auto next = state.allocations.upper_bound(at);
  if (next == state.allocations.begin()) return gpuErrorInvalidValue;
  --next;
  if (at - next->first >= next->second.bytes) return gpuErrorInvalidValue;
  *found = {next->second.device, const_cast<void*>(pointer), next->second.kind};
  return gpuSuccess;
}

struct gpuIpcMemHandle_t {
  std::uint8_t bytes[64];
};
constexpr unsigned gpuIpcMemLazyEnablePeerAccess = 1;
// Nobody opens them: tests have both sides in one process, or slots in host memory.
inline gpuError_t gpuIpcGetMemHandle(gpuIpcMemHandle_t* handle, void* pointer) {
  *handle = {};
  std::memcpy(handle->bytes, &pointer, sizeof pointer);
  return gpuSuccess;
}
inline gpuError_t gpuIpcOpenMemHandle(void**, gpuIpcMemHandle_t, unsigned) {
  return gpuErrorNotSupported;
}
inline gpuError_t gpuIpcCloseMemHandle(void*) {
  return gpuErrorNotSupported;
}

constexpr unsigned gpuStreamNonBlocking = 1;
enum gpuStreamCaptureStatus { gpuStreamCaptureStatusNone };
inline gpuError_t gpuDeviceGetStreamPriorityRange(int* least, int* most) {
  return *least = *most = 0, gpuSuccess;
}
inline gpuError_t gpuStreamCreateWithPriority(gpuStream_t* stream, unsigned, int) {
  return *stream = new EmulatedStream{emulated_device}, gpuSuccess;
}
inline gpuError_t gpuStreamDestroy(gpuStream_t stream) {
  return delete stream, gpuSuccess;
}
inline gpuError_t gpuStreamQuery(gpuStream_t) {
  return gpuSuccess;
}
inline gpuError_t gpuStreamSynchronize(gpuStream_t) {
  return gpuSuccess;
}
inline gpuError_t gpuStreamIsCapturing(gpuStream_t, gpuStreamCaptureStatus*) {
  return gpuSuccess;
}
inline gpuError_t gpuStreamWaitEvent(gpuStream_t, gpuEvent_t, unsigned) {
  return gpuSuccess;
}
constexpr unsigned gpuEventDefault = 0, gpuEventDisableTiming = 2;
inline gpuError_t gpuEventCreateWithFlags(gpuEvent_t* event, unsigned) {
  return *event = new EmulatedEvent{emulated_device}, gpuSuccess;
}
inline gpuError_t gpuEventDestroy(gpuEvent_t event) {
  return delete event, gpuSuccess;
}
inline gpuError_t gpuEventRecord(gpuEvent_t, gpuStream_t) {
  return gpuSuccess;
}
inline gpuError_t gpuEventQuery(gpuEvent_t) {
  return gpuSuccess;
}
inline gpuError_t gpuEventSynchronize(gpuEvent_t) {
  return gpuSuccess;
}
inline gpuError_t gpuEventElapsedTime(float* milliseconds, gpuEvent_t, gpuEvent_t) {
  return *milliseconds = 0, gpuSuccess;
}
enum gpuMemcpyKind { gpuMemcpyDefault };
inline gpuError_t gpuMemcpyAsync(void* dst, const void* src, std::size_t bytes, gpuMemcpyKind, gpuStream_t) {
  return std::memcpy(dst, src, bytes), gpuSuccess;
}
inline gpuError_t gpuMemsetAsync(void* dst, int byte, std::size_t bytes, gpuStream_t) {
  return std::memset(dst, byte, bytes), gpuSuccess;
}

namespace hetkv::gpu::vendor {

inline bool address_range(const void* pointer, std::uint64_t* base, std::uint64_t* bytes) {
  EmulatedState& state = emulated();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto next = --state.allocations.upper_bound(reinterpret_cast<std::uintptr_t>(pointer));
  *base = next->first;
  *bytes = next->second.bytes;
  return true;
}
inline bool has_ipc_handle(const void*) {
  return true;
}
inline std::uint64_t capabilities(int) {
  return kHetkvCapHostRegister | kHetkvCapHostSamePointer | kHetkvCapStreamDevice | kHetkvCapHostAtomicStores |
         kHetkvCapIpc;
}
inline void arch_name(const gpuDeviceProp&, char* text, std::size_t size) {
  std::snprintf(text, size, "host");
}
inline void uuid(const gpuDeviceProp&, std::uint8_t (&)[16]) {}
constexpr int kMultiprocessors = 0;
inline gpuError_t stream_device(gpuStream_t stream, int* device) {
  return *device = stream != nullptr ? stream->device : emulated_device, gpuSuccess;
}
inline int stream_queues() {
  return 0;
}
inline gpuError_t stream_wait_value(gpuStream_t, const std::uint32_t*, std::uint32_t) {
  return gpuErrorNotSupported;
}
inline gpuError_t flush_rdma_writes() {
  return gpuErrorNotSupported;
}
inline gpuError_t exchange_capture_mode(int, int*) {
  return gpuErrorNotSupported;
}
constexpr int kRelaxedCapture = 0;
inline bool is_pinned(const gpuPointerAttributes& found) {
  return found.kind == kHetkvMemoryPinned;
}
inline bool is_device(const gpuPointerAttributes& found) {
  return found.kind == kHetkvMemoryDevice;
}
inline bool is_managed(const gpuPointerAttributes&) {
  return false;
}

}  // namespace hetkv::gpu::vendor
