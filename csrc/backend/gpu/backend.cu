// The backend's table over the vendor's runtime: the same source for every vendor.
#include "backend/backend.h"
#include "backend/gpu/functions.h"
#include "backend/gpu_runtime.h"

namespace hetkv::gpu {
namespace {

const HetkvBackend kTable = {
    HETKV_BACKEND_ABI,  sizeof(HetkvBackend),
    sizeof(remap::Job), 0,
    HETKV_VENDOR,       last_error,
    device_count,       device_info,
    memory_info,        can_access_peer,
    enable_peer,        pointer_info,
    device_alloc,       device_free,
    host_alloc,         host_free,
    host_register,      host_unregister,
    ipc_export,         ipc_open,
    ipc_close,          stream_create,
    stream_destroy,     stream_synchronize,
    stream_device,      stream_is_capturing,
    stream_wait_event,  event_create,
    event_destroy,      event_record,
    event_query,        event_synchronize,
    event_elapsed_us,   exchange_capture_mode,
    copy_async,         fill_async,
    flush_rdma_writes,  slot_create,
    slot_destroy,       remap,
    stream_wait_value,  bind_thread,
};

}  // namespace
}  // namespace hetkv::gpu

extern "C" __attribute__((visibility("default"))) const HetkvBackend* hetkv_backend() {
  return &hetkv::gpu::kTable;
}
