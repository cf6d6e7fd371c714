// CUDA under the neutral names of gpu_runtime.h.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "backend/backend.h"

#define HETKV_VENDOR "cuda"
#define HETKV_RUNTIME_VERSION CUDART_VERSION

#define gpuError_t cudaError_t
#define gpuSuccess cudaSuccess
#define gpuErrorNotReady cudaErrorNotReady
#define gpuErrorInvalidValue cudaErrorInvalidValue
#define gpuErrorMemoryAllocation cudaErrorMemoryAllocation
#define gpuErrorNoDevice cudaErrorNoDevice
#define gpuErrorInsufficientDriver cudaErrorInsufficientDriver
#define gpuErrorInvalidDevice cudaErrorInvalidDevice
#define gpuErrorNotSupported cudaErrorNotSupported
#define gpuErrorPeerAccessAlreadyEnabled cudaErrorPeerAccessAlreadyEnabled
#define gpuErrorHostMemoryAlreadyRegistered cudaErrorHostMemoryAlreadyRegistered
#define gpuErrorInvalidResourceHandle cudaErrorInvalidResourceHandle
#define gpuGetErrorString cudaGetErrorString
#define gpuGetLastError cudaGetLastError
#define gpuGetDeviceCount cudaGetDeviceCount
#define gpuGetDevice cudaGetDevice
#define gpuSetDevice cudaSetDevice
#define gpuGetDeviceProperties cudaGetDeviceProperties
#define gpuDeviceProp cudaDeviceProp
#define gpuDeviceGetAttribute cudaDeviceGetAttribute
#define gpuDeviceGetPCIBusId cudaDeviceGetPCIBusId
#define gpuDriverGetVersion cudaDriverGetVersion
#define gpuRuntimeGetVersion cudaRuntimeGetVersion
#define gpuMemGetInfo cudaMemGetInfo
#define gpuDeviceCanAccessPeer cudaDeviceCanAccessPeer
#define gpuDeviceEnablePeerAccess cudaDeviceEnablePeerAccess
#define gpuPointerAttributes cudaPointerAttributes
#define gpuPointerGetAttributes cudaPointerGetAttributes
#define gpuMalloc cudaMalloc
#define gpuFree cudaFree
#define gpuHostAlloc cudaHostAlloc
#define gpuHostFree cudaFreeHost
#define gpuHostAllocPortable cudaHostAllocPortable
#define gpuHostAllocMapped cudaHostAllocMapped
#define gpuHostRegister cudaHostRegister
#define gpuHostUnregister cudaHostUnregister
#define gpuHostRegisterPortable cudaHostRegisterPortable
#define gpuHostRegisterMapped cudaHostRegisterMapped
#define gpuHostGetDevicePointer cudaHostGetDevicePointer
#define gpuIpcMemHandle_t cudaIpcMemHandle_t
#define gpuIpcGetMemHandle cudaIpcGetMemHandle
#define gpuIpcOpenMemHandle cudaIpcOpenMemHandle
#define gpuIpcCloseMemHandle cudaIpcCloseMemHandle
#define gpuIpcMemLazyEnablePeerAccess cudaIpcMemLazyEnablePeerAccess
#define gpuStream_t cudaStream_t
#define gpuStreamCreateWithPriority cudaStreamCreateWithPriority
#define gpuStreamDestroy cudaStreamDestroy
#define gpuStreamQuery cudaStreamQuery
#define gpuStreamSynchronize cudaStreamSynchronize
#define gpuStreamNonBlocking cudaStreamNonBlocking
#define gpuStreamIsCapturing cudaStreamIsCapturing
#define gpuStreamCaptureStatus cudaStreamCaptureStatus
#define gpuStreamCaptureStatusNone cudaStreamCaptureStatusNone
#define gpuStreamWaitEvent cudaStreamWaitEvent
#define gpuDeviceGetStreamPriorityRange cudaDeviceGetStreamPriorityRange
#define gpuEvent_t cudaEvent_t
#define gpuEventCreateWithFlags cudaEventCreateWithFlags
#define gpuEventDestroy cudaEventDestroy
#define gpuEventRecord cudaEventRecord
#define gpuEventQuery cudaEventQuery
#define gpuEventSynchronize cudaEventSynchronize
#define gpuEventElapsedTime cudaEventElapsedTime
#define gpuEventDisableTiming cudaEventDisableTiming
#define gpuEventDefault cudaEventDefault
#define gpuMemcpyAsync cudaMemcpyAsync
#define gpuMemcpyDefault cudaMemcpyDefault
#define gpuMemsetAsync cudaMemsetAsync
#define gpuOccupancyMaxActiveBlocksPerMultiprocessor cudaOccupancyMaxActiveBlocksPerMultiprocessor
#define gpuFuncAttributes cudaFuncAttributes
#define gpuFuncGetAttributes cudaFuncGetAttributes

namespace hetkv::gpu::vendor {

// A function of the driver, which the runtime has loaded already; null where there is none.
template <typename Function>
Function driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return library != nullptr ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
}

inline bool address_range(const void* pointer, std::uint64_t* base, std::uint64_t* bytes) {
  static const auto get = driver<CUresult (*)(CUdeviceptr*, std::size_t*, CUdeviceptr)>("cuMemGetAddressRange_v2");
  CUdeviceptr start = 0;
  std::size_t size = 0;
  if (get == nullptr || get(&start, &size, reinterpret_cast<CUdeviceptr>(pointer)) != CUDA_SUCCESS) return false;
  *base = start;
  *bytes = size;
  return true;
}

inline bool has_ipc_handle(const void* pointer) {
  static const auto get = driver<CUresult (*)(void*, CUpointer_attribute, CUdeviceptr)>("cuPointerGetAttribute");
  int capable = 0;
  return get != nullptr &&
         get(&capable, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, reinterpret_cast<CUdeviceptr>(pointer)) ==
             CUDA_SUCCESS &&
         capable != 0;
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

inline int stream_queues() {
  const char* const set = std::getenv("CUDA_DEVICE_MAX_CONNECTIONS");
  const int queues = set != nullptr ? std::atoi(set) : 0;
  return queues >= 1 && queues <= 32 ? queues : 8;
}

inline std::uint64_t capabilities(int device) {
  std::uint64_t bits = kHetkvCapRelaxedCapture | kHetkvCapHostAtomicStores;
  if (attribute(cudaDevAttrIpcEventSupport, device) != 0) bits |= kHetkvCapIpc;
  if (attribute(cudaDevAttrHostRegisterSupported, device) != 0) bits |= kHetkvCapHostRegister;
  if (attribute(cudaDevAttrCanUseHostPointerForRegisteredMem, device) != 0) bits |= kHetkvCapHostSamePointer;
  if (attribute(cudaDevAttrGPUDirectRDMASupported, device) != 0) bits |= kHetkvCapRdma;
  if (attribute(cudaDevAttrGPUDirectRDMAWritesOrdering, device) >= cudaGPUDirectRDMAWritesOrderingOwner) {
    bits |= kHetkvCapRdmaOrdered;
  }
  if ((attribute(cudaDevAttrGPUDirectRDMAFlushWritesOptions, device) & cudaFlushGPUDirectRDMAWritesOptionHost) != 0) {
    bits |= kHetkvCapRdmaFlush;
  }
  if (driver<void*>("cuStreamWaitValue32_v2") != nullptr) bits |= kHetkvCapStreamWaitValue;
#if CUDART_VERSION >= 12080
  bits |= kHetkvCapStreamDevice;
#endif
  const int arch =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (arch >= 89) bits |= kHetkvCapHardwareConversion;
  return bits;
}

inline void arch_name(const cudaDeviceProp& device, char* text, std::size_t size) {
  std::snprintf(text, size, "sm_%d%d", device.major, device.minor);
}

inline void uuid(const cudaDeviceProp& device, std::uint8_t (&bytes)[16]) {
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<std::uint8_t>(device.uuid.bytes[i]);
}

constexpr cudaDeviceAttr kMultiprocessors = cudaDevAttrMultiProcessorCount;

inline cudaError_t stream_device(cudaStream_t stream, int* device) {
#if CUDART_VERSION >= 12080
  return cudaStreamGetDevice(stream, device);
#else
  static_cast<void>(stream);
  static_cast<void>(device);
  return cudaErrorNotSupported;
#endif
}

using WaitValue = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

inline cudaError_t stream_wait_value(cudaStream_t stream, const std::uint32_t* word, std::uint32_t value) {
  static const auto wait = driver<WaitValue>("cuStreamWaitValue32_v2");
  if (wait == nullptr) return cudaErrorNotSupported;
  const auto address = reinterpret_cast<CUdeviceptr>(word);
  return wait(stream, address, value, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS ? cudaSuccess : cudaErrorUnknown;
}

inline cudaError_t flush_rdma_writes() {
  return cudaDeviceFlushGPUDirectRDMAWrites(cudaFlushGPUDirectRDMAWritesTargetCurrentDevice,
                                            cudaFlushGPUDirectRDMAWritesToOwner);
}

inline cudaError_t exchange_capture_mode(int relaxed, int* previous) {
  cudaStreamCaptureMode mode = static_cast<cudaStreamCaptureMode>(relaxed);
  const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  *previous = static_cast<int>(mode);
  return error;
}
constexpr int kRelaxedCapture = cudaStreamCaptureModeRelaxed;

#if defined(__CUDACC__)
// Lets the launch begin while a remap before it in the stream ends (kernel.h), on devices that can.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
#endif

inline bool is_pinned(const cudaPointerAttributes& found) {
  return found.type == cudaMemoryTypeHost;
}
inline bool is_device(const cudaPointerAttributes& found) {
  return found.type == cudaMemoryTypeDevice;
}
inline bool is_managed(const cudaPointerAttributes& found) {
  return found.type == cudaMemoryTypeManaged;
}

}  // namespace hetkv::gpu::vendor
