// HIP under the neutral names of gpu_runtime.h.
#pragma once

#include <hip/hip_runtime.h>
#include <hip/hip_version.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "backend/backend.h"

#define HETKV_VENDOR "hip"
#define HETKV_RUNTIME_VERSION (HIP_VERSION_MAJOR * 1000 + HIP_VERSION_MINOR * 10)

#define gpuError_t hipError_t
#define gpuSuccess hipSuccess
#define gpuErrorNotReady hipErrorNotReady
#define gpuErrorInvalidValue hipErrorInvalidValue
#define gpuErrorMemoryAllocation hipErrorOutOfMemory
#define gpuErrorNoDevice hipErrorNoDevice
#define gpuErrorInsufficientDriver hipErrorInsufficientDriver
#define gpuErrorInvalidDevice hipErrorInvalidDevice
#define gpuErrorNotSupported hipErrorNotSupported
#define gpuErrorPeerAccessAlreadyEnabled hipErrorPeerAccessAlreadyEnabled
#define gpuErrorHostMemoryAlreadyRegistered hipErrorHostMemoryAlreadyRegistered
#define gpuErrorInvalidResourceHandle hipErrorInvalidHandle
#define gpuGetErrorString hipGetErrorString
#define gpuGetLastError hipGetLastError
#define gpuGetDeviceCount hipGetDeviceCount
#define gpuGetDevice hipGetDevice
#define gpuSetDevice hipSetDevice
#define gpuGetDeviceProperties hipGetDeviceProperties
#define gpuDeviceProp hipDeviceProp_t
#define gpuDeviceGetAttribute hipDeviceGetAttribute
#define gpuDeviceGetPCIBusId hipDeviceGetPCIBusId
#define gpuDriverGetVersion hipDriverGetVersion
#define gpuRuntimeGetVersion hipRuntimeGetVersion
#define gpuMemGetInfo hipMemGetInfo
#define gpuDeviceCanAccessPeer hipDeviceCanAccessPeer
#define gpuDeviceEnablePeerAccess hipDeviceEnablePeerAccess
#define gpuPointerAttributes hipPointerAttribute_t
#define gpuPointerGetAttributes hipPointerGetAttributes
#define gpuMalloc hipMalloc
#define gpuFree hipFree
#define gpuHostAlloc hipHostMalloc
#define gpuHostFree hipHostFree
#define gpuHostAllocPortable hipHostMallocPortable
#define gpuHostAllocMapped hipHostMallocMapped
#define gpuHostRegister hipHostRegister
#define gpuHostUnregister hipHostUnregister
#define gpuHostRegisterPortable hipHostRegisterPortable
#define gpuHostRegisterMapped hipHostRegisterMapped
#define gpuHostGetDevicePointer hipHostGetDevicePointer
#define gpuIpcMemHandle_t hipIpcMemHandle_t
#define gpuIpcGetMemHandle hipIpcGetMemHandle
#define gpuIpcOpenMemHandle hipIpcOpenMemHandle
#define gpuIpcCloseMemHandle hipIpcCloseMemHandle
#define gpuIpcMemLazyEnablePeerAccess hipIpcMemLazyEnablePeerAccess
#define gpuStream_t hipStream_t
#define gpuStreamCreateWithPriority hipStreamCreateWithPriority
#define gpuStreamDestroy hipStreamDestroy
#define gpuStreamQuery hipStreamQuery
#define gpuStreamSynchronize hipStreamSynchronize
#define gpuStreamNonBlocking hipStreamNonBlocking
#define gpuStreamIsCapturing hipStreamIsCapturing
#define gpuStreamCaptureStatus hipStreamCaptureStatus
#define gpuStreamCaptureStatusNone hipStreamCaptureStatusNone
#define gpuStreamWaitEvent hipStreamWaitEvent
#define gpuDeviceGetStreamPriorityRange hipDeviceGetStreamPriorityRange
#define gpuEvent_t hipEvent_t
#define gpuEventCreateWithFlags hipEventCreateWithFlags
#define gpuEventDestroy hipEventDestroy
#define gpuEventRecord hipEventRecord
#define gpuEventQuery hipEventQuery
#define gpuEventSynchronize hipEventSynchronize
#define gpuEventElapsedTime hipEventElapsedTime
#define gpuEventDisableTiming hipEventDisableTiming
#define gpuEventDefault hipEventDefault
#define gpuMemcpyAsync hipMemcpyAsync
#define gpuMemcpyDefault hipMemcpyDefault
#define gpuMemsetAsync hipMemsetAsync
#define gpuOccupancyMaxActiveBlocksPerMultiprocessor hipOccupancyMaxActiveBlocksPerMultiprocessor
#define gpuFuncAttributes hipFuncAttributes
#define gpuFuncGetAttributes hipFuncGetAttributes

namespace hetkv::gpu::vendor {

inline bool address_range(const void* pointer, std::uint64_t* base, std::uint64_t* bytes) {
  hipDeviceptr_t start = nullptr;
  std::size_t size = 0;
  if (hipMemGetAddressRange(&start, &size, const_cast<void*>(pointer)) != hipSuccess) return false;
  *base = reinterpret_cast<std::uintptr_t>(start);
  *bytes = size;
  return true;
}

// HIP has no query, so it is tried.
inline bool has_ipc_handle(const void* pointer) {
  hipIpcMemHandle_t handle;
  return hipIpcGetMemHandle(&handle, const_cast<void*>(pointer)) == hipSuccess;
}

inline int stream_queues() {
  const char* const set = std::getenv("GPU_MAX_HW_QUEUES");
  const int queues = set != nullptr ? std::atoi(set) : 0;
  return queues >= 1 ? queues : 4;
}

inline std::uint64_t capabilities(int device) {
  // GPUs of this vendor read and write registered host memory under the host's address, and see RDMA writes to their
  // memory in order; a thread of this version takes part in captures.
  std::uint64_t bits = kHetkvCapIpc | kHetkvCapHostRegister | kHetkvCapHostSamePointer | kHetkvCapRdma |
                       kHetkvCapRdmaOrdered | kHetkvCapHostAtomicStores;
  int can_wait = 0;
  if (hipDeviceGetAttribute(&can_wait, hipDeviceAttributeCanUseStreamWaitValue, device) == hipSuccess &&
      can_wait != 0) {
    bits |= kHetkvCapStreamWaitValue;
  }
  return bits;
}

inline void arch_name(const hipDeviceProp_t& device, char* text, std::size_t size) {
  std::snprintf(text, size, "%.*s", static_cast<int>(size) - 1, device.gcnArchName);
}

// HIP's device properties hold none in this version; the PCI bus id names the device.
inline void uuid(const hipDeviceProp_t&, std::uint8_t (&)[16]) {}

constexpr hipDeviceAttribute_t kMultiprocessors = hipDeviceAttributeMultiprocessorCount;

inline hipError_t stream_device(hipStream_t, int*) {
  return hipErrorNotSupported;
}
inline hipError_t stream_wait_value(hipStream_t stream, const std::uint32_t* word, std::uint32_t value) {
  return hipStreamWaitValue32(stream, const_cast<std::uint32_t*>(word), value, hipStreamWaitValueGte, 0xFFFFFFFFu);
}
inline hipError_t flush_rdma_writes() {
  return hipErrorNotSupported;
}
inline hipError_t exchange_capture_mode(int, int*) {
  return hipErrorNotSupported;
}
constexpr int kRelaxedCapture = 0;

template <typename Kernel, typename... Arguments>
hipError_t launch(Kernel kernel, unsigned blocks, unsigned threads, hipStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
  return hipGetLastError();
}

inline bool is_pinned(const hipPointerAttribute_t& found) {
  return found.memoryType == hipMemoryTypeHost;
}
inline bool is_device(const hipPointerAttribute_t& found) {
  return found.memoryType == hipMemoryTypeDevice;
}
inline bool is_managed(const hipPointerAttribute_t& found) {
  return found.isManaged != 0;
}

}  // namespace hetkv::gpu::vendor
