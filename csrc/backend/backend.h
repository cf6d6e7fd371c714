// The only contract between hetkv and a GPU vendor. Each vendor is one shared object (`libhetkv_cuda.so`,
// `libhetkv_hip.so`) that exports one symbol, `hetkv_backend`, which returns a table of functions; loader.h opens it.
// The core calls a GPU through this table and nothing else.
//
// Rules that hold for every function:
// - It returns a HetkvGpuStatus. Where that is neither kHetkvOk nor kHetkvNotReady, `last_error()` is one line of text
//   for this thread, valid until this thread's next failing call.
// - It may be called from any thread. It leaves the thread's current device as it was, never prints, never throws.
// - `device` is the vendor's ordinal, as in `cuda:0`. A function that takes a stream or an event needs no device.
// - Streams and events are the vendor's own handles (cudaStream_t, hipEvent_t) as `void*`, so those of the caller's
//   framework can be passed in; a null stream is the default stream of the current device.
// - Unless its comment says otherwise a function does not wait for the device. Those that allocate or free may, so they
//   have no place on the path of a byte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "remap/remap.h"

#define HETKV_BACKEND_ABI 6
#define HETKV_BACKEND_SYMBOL "hetkv_backend"

extern "C" {

enum HetkvGpuStatus : std::int32_t {
  kHetkvOk = 0,
  kHetkvNotReady = 1,     // event_query: work before the event is still running
  kHetkvInvalid = 2,      // the caller's value is wrong
  kHetkvOutOfMemory = 3,  // of the device or of pinned host memory
  kHetkvUnsupported = 4,  // this device, driver or build cannot do that; see the capabilities
  kHetkvNoDevice = 5,     // no such device, or no driver
  kHetkvFailed = 6,       // the driver reported an error; after a fault in a kernel every later call may say so
};

// What a device can do. A missing bit means that the function it names returns kHetkvUnsupported.
enum HetkvCapability : std::uint64_t {
  kHetkvCapIpc = 1u << 0,                 // ipc_export and ipc_open, for memory of device_alloc
  kHetkvCapHostRegister = 1u << 1,        // host_register
  kHetkvCapHostSamePointer = 1u << 2,     // registered host memory has the host's address on the device too
  kHetkvCapRdma = 1u << 3,                // RDMA devices can reach this device's memory
  kHetkvCapRdmaOrdered = 1u << 4,         // kernels started after an RDMA write see it without flush_rdma_writes
  kHetkvCapRdmaFlush = 1u << 5,           // flush_rdma_writes
  kHetkvCapStreamDevice = 1u << 6,        // stream_device
  kHetkvCapRelaxedCapture = 1u << 7,      // exchange_capture_mode keeps this thread out of other threads' captures
  kHetkvCapHardwareConversion = 1u << 8,  // fp8 conversions in hardware; in software elsewhere, with the same result
  kHetkvCapHostAtomicStores = 1u << 9,    // 8-byte stores to host memory arrive whole
  kHetkvCapStreamWaitValue = 1u << 10,    // stream_wait_value
};

struct HetkvDeviceInfo {
  char name[128];       // of the product
  char arch[32];        // "sm_90", "gfx942"
  char pci_bus_id[32];  // "0000:19:00.0": the same device has the same one in every process of a host
  std::uint8_t uuid[16];
  std::uint64_t total_memory;  // bytes
  std::uint64_t l2_bytes;
  std::uint64_t capabilities;  // HetkvCapability bits
  std::int32_t multiprocessors;
  std::int32_t driver_version;   // as the vendor's runtime gives it: 13000 is CUDA 13.0
  std::int32_t runtime_version;  // of the runtime that this backend was built with
  // Hardware queues that the process's streams share: once each holds a stream that waits for the host, no other stream
  // of the device runs. 0: not known.
  std::int32_t stream_queues;
};

enum HetkvMemoryKind : std::int32_t {
  kHetkvMemoryHost = 0,    // pageable, unknown to the vendor
  kHetkvMemoryPinned = 1,  // of host_alloc or host_register, or the vendor's equal
  kHetkvMemoryDevice = 2,
  kHetkvMemoryManaged = 3,  // migrates between host and device
};

struct HetkvPointerInfo {
  std::int32_t kind;             // HetkvMemoryKind
  std::int32_t device;           // that the memory belongs to; -1 for kHetkvMemoryHost
  std::uint64_t base;            // of the allocation, as the device sees it; 0 where unknown
  std::uint64_t bytes;           // of the allocation; 0 where unknown
  std::uint64_t device_pointer;  // that a kernel may use for this pointer; 0 where there is none
  std::int32_t ipc;  // 1: ipc_export works on it. Memory made of mapped pieces (PyTorch's expandable_segments, pools
                     // of the virtual-memory API) has no such handle
};

struct HetkvIpcHandle {
  std::uint8_t bytes[64];  // of the allocation that holds the pointer
  std::uint64_t offset;    // of the pointer from the allocation's base
  std::uint64_t length;    // of the allocation: opening it exposes all of that
};

constexpr std::size_t kHetkvMaxFrames = 64;  // of one launch,
constexpr std::size_t kHetkvMaxJobs = 512;   // and their jobs: up to four segments a frame, and scales to fill

// One frame of a launch: its jobs follow those of the frame before, and are summed up together.
struct HetkvRemapFrame {
  std::uint64_t seed;  // of its checksum
  std::uint64_t num_jobs;
};

// What the remap of a frame found.
struct HetkvRemapResult {
  std::uint64_t checksum;
  std::uint64_t saturated;
};

// Where a launch reports. Made by `slot_create`; used by one launch at a time, any number of times. `results`, one a
// frame, are written once by the launch and may be read by the host as soon as an event recorded after it is done.
struct HetkvRemapSlot {
  const HetkvRemapResult* results;  // pinned host memory
  void* scratch;                    // the backend's own
  std::int32_t device;
};

struct HetkvBackend {
  std::uint32_t abi;       // HETKV_BACKEND_ABI
  std::uint32_t size;      // sizeof(HetkvBackend)
  std::uint32_t job_size;  // sizeof(hetkv::remap::Job): both sides were built from the same remap.h
  std::uint32_t reserved;
  const char* name;  // "cuda" or "hip"; also PyTorch's name of the device type, except that its HIP build says "cuda"

  const char* (*last_error)();

  // --- devices ---
  std::int32_t (*device_count)(std::int32_t* count);  // 0 with kHetkvOk where there is a driver but no device
  std::int32_t (*device_info)(std::int32_t device, HetkvDeviceInfo* info);
  std::int32_t (*memory_info)(std::int32_t device, std::uint64_t* free_bytes, std::uint64_t* total_bytes);
  std::int32_t (*can_access_peer)(std::int32_t device, std::int32_t peer, std::int32_t* can);
  std::int32_t (*enable_peer)(std::int32_t device, std::int32_t peer);  // kernels of `device` may use `peer`'s memory

  // --- memory; device_alloc is one allocation of its own each time, so it has a legacy IPC handle ---
  std::int32_t (*pointer_info)(const void* pointer, HetkvPointerInfo* info);
  std::int32_t (*device_alloc)(std::int32_t device, std::size_t bytes, void** pointer);
  std::int32_t (*device_free)(std::int32_t device, void* pointer);
  std::int32_t (*host_alloc)(std::size_t bytes, void** pointer);  // pinned, mapped, visible to all devices
  std::int32_t (*host_free)(void* pointer);
  // Pins memory of the caller, which stays mapped until host_unregister. `*device_pointer` is its address for `device`.
  std::int32_t (*host_register)(std::int32_t device, void* pointer, std::size_t bytes, void** device_pointer);
  std::int32_t (*host_unregister)(void* pointer);

  // --- memory of another process on the same host, same vendor ---
  std::int32_t (*ipc_export)(const void* pointer, HetkvIpcHandle* handle);
  // Maps it for kernels of `device`, with peer access where it is on another one. `*pointer` is what was exported.
  // A process cannot open its own. One ipc_close for each ipc_open; the exporter frees only after the last of them.
  std::int32_t (*ipc_open)(std::int32_t device, const HetkvIpcHandle* handle, void** pointer);
  std::int32_t (*ipc_close)(std::int32_t device, const HetkvIpcHandle* handle, void* pointer);

  // --- streams and events ---
  // Streams have no order towards the null stream. They and events are made ahead, and kept for the next taker once
  // destroyed: a driver may make new ones only after a stream that waits for the host.
  std::int32_t (*stream_create)(std::int32_t device, std::int32_t high_priority, void** stream);
  std::int32_t (*stream_destroy)(void* stream);
  std::int32_t (*stream_synchronize)(void* stream);  // waits; for orderly ends only
  std::int32_t (*stream_device)(void* stream, std::int32_t* device);
  // A null stream is the default one of `device`; another one is a stream of it.
  std::int32_t (*stream_is_capturing)(std::int32_t device, void* stream, std::int32_t* capturing);
  std::int32_t (*stream_wait_event)(void* stream, void* event);
  std::int32_t (*event_create)(std::int32_t device, std::int32_t timed, void** event);
  std::int32_t (*event_destroy)(void* event);
  std::int32_t (*event_record)(std::int32_t device, void* event, void* stream);  // as above
  std::int32_t (*event_query)(void* event);        // kHetkvOk: done; kHetkvNotReady; or an error
  std::int32_t (*event_synchronize)(void* event);  // waits
  std::int32_t (*event_elapsed_us)(void* start, void* stop, double* microseconds);  // both timed and done

  // A thread that calls the vendor's API while another thread captures a CUDA graph would spoil that capture. Setting
  // `relaxed` keeps this thread out of it; `*previous` is what to set when done. Without kHetkvCapRelaxedCapture the
  // thread must make no call at all while a stream of its process captures.
  std::int32_t (*exchange_capture_mode)(std::int32_t relaxed, std::int32_t* previous);

  // --- work in a stream's order ---
  std::int32_t (*copy_async)(void* dst, const void* src, std::size_t bytes, void* stream);  // any kind to any kind
  std::int32_t (*fill_async)(void* dst, std::int32_t byte, std::size_t bytes, void* stream);
  // Makes RDMA writes that the host knows to be complete visible to kernels launched afterwards.
  std::int32_t (*flush_rdma_writes)(std::int32_t device);

  // --- remap ---
  std::int32_t (*slot_create)(std::int32_t device, HetkvRemapSlot* slot);
  std::int32_t (*slot_destroy)(HetkvRemapSlot* slot);

  // Runs the jobs (remap/remap.h) of `num_frames` frames as one launch in the order of `stream`, a stream of
  // `slot->device`; no allocation, no wait, and a cost that hardly grows with the frames. `jobs` and `frames` are
  // copied before the call returns. All that the jobs point to must be readable by that device and stay valid until the
  // launch is done: both maps' memory, `blocks` and `multipliers`. Block tables in device memory are read at full
  // speed; in pinned host memory each thread block waits for the bus. The padding of a wire destination up to a
  // multiple of 8 bytes is set to zero. `max_blocks` bounds the thread blocks that run at once, so that a caller can
  // leave multiprocessors to others; 0: as many as fit. A payload of codes with scales is read once, unless new scales
  // are found from it. Groups of scales are not split into packs; a job with scales has fewer than 2^31 elements.
  std::int32_t (*remap)(void* stream, const hetkv::remap::Job* jobs, const HetkvRemapFrame* frames,
                        std::size_t num_frames, const HetkvRemapSlot* slot, std::int32_t max_blocks);

  // --- the host's part in a stream's order ---
  // What is put into `stream` later runs once int32(*word - value) >= 0. `word` is memory of host_alloc, which the host
  // writes; the wait holds up no thread and no multiprocessor.
  std::int32_t (*stream_wait_value)(std::int32_t device, void* stream, const std::uint32_t* word, std::uint32_t value);
  // Makes `device` this thread's current one permanently: for a thread of the engine, on which UCX calls the driver.
  std::int32_t (*bind_thread)(std::int32_t device);
};

typedef const HetkvBackend* (*HetkvBackendEntry)();

}  // extern "C"
