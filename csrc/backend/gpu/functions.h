// The functions of the backend's table (backend/backend.h says what each does), by the file that has them.
#pragma once

#include "backend/backend.h"

namespace hetkv::gpu {

// status.cu
const char* last_error();

// devices.cu
std::int32_t device_count(std::int32_t* count);
std::int32_t device_info(std::int32_t device, HetkvDeviceInfo* info);
std::int32_t memory_info(std::int32_t device, std::uint64_t* free_bytes, std::uint64_t* total_bytes);
std::int32_t can_access_peer(std::int32_t device, std::int32_t peer, std::int32_t* can);
std::int32_t enable_peer(std::int32_t device, std::int32_t peer);
std::int32_t bind_thread(std::int32_t device);

// allocations.cu
std::int32_t pointer_info(const void* pointer, HetkvPointerInfo* info);
std::int32_t device_alloc(std::int32_t device, std::size_t bytes, void** pointer);
std::int32_t device_free(std::int32_t device, void* pointer);
std::int32_t host_alloc(std::size_t bytes, void** pointer);
std::int32_t host_free(void* pointer);
std::int32_t host_register(std::int32_t device, void* pointer, std::size_t bytes, void** device_pointer);
std::int32_t host_unregister(void* pointer);
std::int32_t ipc_export(const void* pointer, HetkvIpcHandle* handle);
std::int32_t ipc_open(std::int32_t device, const HetkvIpcHandle* handle, void** pointer);
std::int32_t ipc_close(std::int32_t device, const HetkvIpcHandle* handle, void* pointer);

// streams.cu
std::int32_t stream_create(std::int32_t device, std::int32_t high_priority, void** stream);
std::int32_t stream_destroy(void* stream);
std::int32_t stream_synchronize(void* stream);
std::int32_t stream_device(void* stream, std::int32_t* device);
std::int32_t stream_is_capturing(std::int32_t device, void* stream, std::int32_t* capturing);
std::int32_t stream_wait_event(void* stream, void* event);
std::int32_t event_create(std::int32_t device, std::int32_t timed, void** event);
std::int32_t event_destroy(void* event);
std::int32_t event_record(std::int32_t device, void* event, void* stream);
std::int32_t event_query(void* event);
std::int32_t event_synchronize(void* event);
std::int32_t event_elapsed_us(void* start, void* stop, double* microseconds);
std::int32_t exchange_capture_mode(std::int32_t relaxed, std::int32_t* previous);
std::int32_t copy_async(void* dst, const void* src, std::size_t bytes, void* stream);
std::int32_t fill_async(void* dst, std::int32_t byte, std::size_t bytes, void* stream);
std::int32_t flush_rdma_writes(std::int32_t device);
std::int32_t stream_wait_value(std::int32_t device, void* stream, const std::uint32_t* word, std::uint32_t value);

// remaps.cu
std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot);
std::int32_t slot_destroy(HetkvRemapSlot* slot);
std::int32_t remap(void* stream, const remap::Job* jobs, const HetkvRemapFrame* frames, std::size_t num_frames,
                   const HetkvRemapSlot* slot, std::int32_t max_blocks);

}  // namespace hetkv::gpu
