// The backend's table over the vendor's runtime: the same source for every vendor.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <set>

#include "backend/backend.h"
#include "backend/gpu/launch.h"

namespace hetkv::gpu {
namespace {

thread_local char error_text[256] = "";

__attribute__((format(printf, 2, 3))) std::int32_t fail(std::int32_t status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
  return status;
}

// Clears the runtime's own note of the last error.
void forget() {
  static_cast<void>(gpuGetLastError());
}

// kHetkvOk, or the status that fits; `what` is the vendor's call.
std::int32_t report(gpuError_t error, const char* what) {
  if (error == gpuSuccess) return kHetkvOk;
  forget();  // so that a framework that asks later does not find our error
  std::int32_t status = kHetkvFailed;
  if (error == gpuErrorMemoryAllocation) status = kHetkvOutOfMemory;
  if (error == gpuErrorNotSupported) status = kHetkvUnsupported;
  if (error == gpuErrorNoDevice || error == gpuErrorInsufficientDriver || error == gpuErrorInvalidDevice) {
    status = kHetkvNoDevice;
  }
  if (error == gpuErrorInvalidValue || error == gpuErrorInvalidResourceHandle) status = kHetkvInvalid;
  return fail(status, "%s: %s", what, gpuGetErrorString(error));
}

#define HETKV_TRY(call)                                    \
  do {                                                     \
    const std::int32_t try_status = report((call), #call); \
    if (try_status != kHetkvOk) return try_status;         \
  } while (false)

// Makes `device` current for a scope.
class Current {
 public:
  explicit Current(int device) {
    error_ = gpuGetDevice(&before_);
    if (error_ == gpuSuccess && before_ != device) {
      error_ = gpuSetDevice(device);
      changed_ = error_ == gpuSuccess;
    }
  }
  ~Current() {
    if (changed_) static_cast<void>(gpuSetDevice(before_));
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  gpuError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  gpuError_t error_;
};

#define HETKV_ON(device)         \
  const Current current(device); \
  if (current.error() != gpuSuccess) return report(current.error(), "making device " #device " current")

gpuStream_t as_stream(void* stream) {
  return static_cast<gpuStream_t>(stream);
}
gpuEvent_t as_event(void* event) {
  return static_cast<gpuEvent_t>(event);
}

// --- devices ---

const char* last_error() {
  return error_text;
}

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

// --- memory ---

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

// What this backend has registered: memory that somebody else registered, UCX for one, is theirs to unregister.
std::mutex registered_mutex;
std::set<const void*> registered;

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

// --- streams and events ---

std::int32_t stream_create(std::int32_t device, std::int32_t high_priority, void** stream) {
  HETKV_ON(device);
  int least = 0, greatest = 0;
  HETKV_TRY(gpuDeviceGetStreamPriorityRange(&least, &greatest));
  gpuStream_t made;
  HETKV_TRY(gpuStreamCreateWithPriority(&made, gpuStreamNonBlocking, high_priority != 0 ? greatest : least));
  *stream = made;
  return kHetkvOk;
}

std::int32_t stream_destroy(void* stream) {
  HETKV_TRY(gpuStreamDestroy(as_stream(stream)));
  return kHetkvOk;
}

std::int32_t stream_synchronize(void* stream) {
  HETKV_TRY(gpuStreamSynchronize(as_stream(stream)));
  return kHetkvOk;
}

std::int32_t stream_device(void* stream, std::int32_t* device) {
  int found = -1;
  HETKV_TRY(vendor::stream_device(as_stream(stream), &found));
  *device = found;
  return kHetkvOk;
}

std::int32_t stream_is_capturing(void* stream, std::int32_t* capturing) {
  gpuStreamCaptureStatus state = gpuStreamCaptureStatusNone;
  HETKV_TRY(gpuStreamIsCapturing(as_stream(stream), &state));
  *capturing = state != gpuStreamCaptureStatusNone;
  return kHetkvOk;
}

std::int32_t stream_wait_event(void* stream, void* event) {
  HETKV_TRY(gpuStreamWaitEvent(as_stream(stream), as_event(event), 0));
  return kHetkvOk;
}

std::int32_t event_create(std::int32_t device, std::int32_t timed, void** event) {
  HETKV_ON(device);
  gpuEvent_t made;
  HETKV_TRY(gpuEventCreateWithFlags(&made, timed != 0 ? gpuEventDefault : gpuEventDisableTiming));
  *event = made;
  return kHetkvOk;
}

std::int32_t event_destroy(void* event) {
  HETKV_TRY(gpuEventDestroy(as_event(event)));
  return kHetkvOk;
}

std::int32_t event_record(void* event, void* stream) {
  HETKV_TRY(gpuEventRecord(as_event(event), as_stream(stream)));
  return kHetkvOk;
}

std::int32_t event_query(void* event) {
  const gpuError_t error = gpuEventQuery(as_event(event));
  if (error == gpuErrorNotReady) {
    forget();
    return kHetkvNotReady;
  }
  return report(error, "querying an event");
}

std::int32_t event_synchronize(void* event) {
  HETKV_TRY(gpuEventSynchronize(as_event(event)));
  return kHetkvOk;
}

std::int32_t event_elapsed_us(void* start, void* stop, double* microseconds) {
  float milliseconds = 0;
  HETKV_TRY(gpuEventElapsedTime(&milliseconds, as_event(start), as_event(stop)));
  *microseconds = 1000.0 * static_cast<double>(milliseconds);
  return kHetkvOk;
}

std::int32_t exchange_capture_mode(std::int32_t relaxed, std::int32_t* previous) {
  // What a caller gets back is the vendor's own number, moved out of the way of 0 and 1.
  int before = 0;
  const int mode = relaxed == 1 ? vendor::kRelaxedCapture : relaxed >= 16 ? relaxed - 16 : 0;
  HETKV_TRY(vendor::exchange_capture_mode(mode, &before));
  *previous = before + 16;
  return kHetkvOk;
}

// --- work in a stream's order ---

std::int32_t copy_async(void* dst, const void* src, std::size_t bytes, void* stream) {
  HETKV_TRY(gpuMemcpyAsync(dst, src, bytes, gpuMemcpyDefault, as_stream(stream)));
  return kHetkvOk;
}

std::int32_t fill_async(void* dst, std::int32_t byte, std::size_t bytes, void* stream) {
  HETKV_TRY(gpuMemsetAsync(dst, byte, bytes, as_stream(stream)));
  return kHetkvOk;
}

std::int32_t flush_rdma_writes(std::int32_t device) {
  HETKV_ON(device);
  HETKV_TRY(vendor::flush_rdma_writes());
  return kHetkvOk;
}

std::int32_t stream_wait_value(std::int32_t device, void* stream, const std::uint32_t* word, std::uint32_t value) {
  HETKV_ON(device);
  HETKV_TRY(vendor::stream_wait_value(as_stream(stream), word, value));
  return kHetkvOk;
}

std::int32_t bind_thread(std::int32_t device) {
  HETKV_TRY(gpuSetDevice(device));
  HETKV_TRY(gpuFree(nullptr));  // makes the device's context, which setting it alone may leave for later
  return kHetkvOk;
}

// --- remap ---

std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot) {
  *slot = HetkvRemapSlot{};
  slot->device = device;
  void* result = nullptr;
  std::int32_t status = host_alloc(sizeof(HetkvRemapResult), &result);
  if (status != kHetkvOk) return status;
  status = device_alloc(device, sizeof(Scratch), &slot->scratch);
  if (status == kHetkvOk) {
    const Current current(device);
    status = report(gpuMemsetAsync(slot->scratch, 0, sizeof(Scratch), nullptr), "clearing a slot");
    if (status == kHetkvOk) status = report(gpuStreamSynchronize(nullptr), "clearing a slot");
    if (status != kHetkvOk) static_cast<void>(gpuFree(slot->scratch));
  }
  if (status != kHetkvOk) {
    static_cast<void>(gpuHostFree(result));
    return status;
  }
  slot->result = new (result) HetkvRemapResult{};
  return kHetkvOk;
}

std::int32_t slot_destroy(HetkvRemapSlot* slot) {
  if (slot->result == nullptr) return kHetkvOk;
  HETKV_ON(slot->device);
  HETKV_TRY(gpuFree(slot->scratch));
  HETKV_TRY(gpuHostFree(const_cast<HetkvRemapResult*>(slot->result)));
  *slot = HetkvRemapSlot{};
  return kHetkvOk;
}

int multiprocessors_of(int device) {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  int count = device < kKnown ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    if (gpuDeviceGetAttribute(&count, vendor::kMultiprocessors, device) != gpuSuccess || count < 1) count = 1;
    if (device < kKnown) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

std::int32_t remap(void* stream, const RemapJob* jobs, std::size_t num_jobs, std::uint64_t seed,
                   const HetkvRemapSlot* slot, std::int32_t max_blocks) {
  HETKV_ON(slot->device);
  if (std::any_of(jobs, jobs + num_jobs, [](const RemapJob& job) { return job.scaled(); })) {
    return fail(kHetkvUnsupported, "scales per token or head cannot be converted on a device yet");
  }
  const int multiprocessors = multiprocessors_of(slot->device);
  Scratch* scratch = static_cast<Scratch*>(slot->scratch);
  std::size_t first = 0;
  do {
    Launch launch;
    if (!plan_launch(jobs + first, num_jobs - first, seed, &launch)) {
      return fail(kHetkvInvalid, "a remap of 2^30 tokens or more");
    }
    first += launch.num_jobs;
    HetkvRemapResult* result = first == num_jobs ? const_cast<HetkvRemapResult*>(slot->result) : nullptr;
    const auto begin = [&](auto function) {
      return function(launch, multiprocessors, max_blocks, scratch, result, as_stream(stream));
    };
    switch (paths_of(launch)) {
      case Paths::kMoves:
        HETKV_TRY(begin(start<Paths::kMoves>));
        break;
      case Paths::kTurns:
        HETKV_TRY(begin(start<Paths::kTurns>));
        break;
      case Paths::kRows:
        HETKV_TRY(begin(start<Paths::kRows>));
        break;
      case Paths::kAll:
        HETKV_TRY(begin(start<Paths::kAll>));
        break;
    }
  } while (first < num_jobs);
  return kHetkvOk;
}

const HetkvBackend kTable = {
    HETKV_BACKEND_ABI, sizeof(HetkvBackend),
    sizeof(RemapJob),  0,
    HETKV_VENDOR,      last_error,
    device_count,      device_info,
    memory_info,       can_access_peer,
    enable_peer,       pointer_info,
    device_alloc,      device_free,
    host_alloc,        host_free,
    host_register,     host_unregister,
    ipc_export,        ipc_open,
    ipc_close,         stream_create,
    stream_destroy,    stream_synchronize,
    stream_device,     stream_is_capturing,
    stream_wait_event, event_create,
    event_destroy,     event_record,
    event_query,       event_synchronize,
    event_elapsed_us,  exchange_capture_mode,
    copy_async,        fill_async,
    flush_rdma_writes, slot_create,
    slot_destroy,      remap,
    stream_wait_value, bind_thread,
};

}  // namespace
}  // namespace hetkv::gpu

extern "C" __attribute__((visibility("default"))) const HetkvBackend* hetkv_backend() {
  return &hetkv::gpu::kTable;
}
