// A backend whose devices are threads of this host: the whole contract of csrc/backend/backend.h, with real asynchrony,
// so that everything above the kernels (order of streams, events, drains, slots in quarantine) runs where there is no
// GPU. It implements the contract; it does not stand in for the kernels, which have tests of their own. Its remap is
// the definition in csrc/map.h, csrc/convert.h and csrc/remap/checksum.h, element by element.
//
// host/options.h says what can be changed about it. A stream is a thread; "device" memory is shared memory in a file,
// so that another process can open it through an IPC handle, as with a real driver.
#include <chrono>
#include <cstring>
#include <mutex>
#include <thread>

#include "backend/backend.h"
#include "host/memory.h"
#include "host/options.h"
#include "host/remap.h"
#include "host/streams.h"

namespace hetkv::host {
namespace {

constexpr int kDevices = 2;

std::int32_t device_count(std::int32_t* count) {
  *count = kDevices;
  return kHetkvOk;
}

std::int32_t device_info(std::int32_t device, HetkvDeviceInfo* info) {
  if (device < 0 || device >= kDevices) return fail(kHetkvNoDevice, "no such device");
  *info = {};
  std::strcpy(info->name, "threads of this host");
  std::strcpy(info->arch, "host");
  info->total_memory = 1ull << 30;
  info->uuid[0] = static_cast<std::uint8_t>(device + 1);
  info->capabilities = kHetkvCapHostRegister | kHetkvCapHostSamePointer | kHetkvCapStreamDevice;
  if (!has("no-ipc")) info->capabilities |= kHetkvCapIpc;
  if (!has("no-wait-value")) info->capabilities |= kHetkvCapStreamWaitValue;
  info->multiprocessors = 1;
  return kHetkvOk;
}

std::int32_t can_access_peer(std::int32_t, std::int32_t, std::int32_t* can) {
  *can = has("no-peer") ? 0 : 1;
  return kHetkvOk;
}

std::int32_t enable_peer(std::int32_t, std::int32_t) {
  return has("no-peer") ? fail(kHetkvUnsupported, "no peer access") : kHetkvOk;
}

std::int32_t bind_thread(std::int32_t) {
  return kHetkvOk;
}

}  // namespace
}  // namespace hetkv::host

using namespace hetkv::host;

extern "C" {

__attribute__((visibility("default"))) const HetkvBackend* hetkv_backend() {
  static const HetkvBackend table = {HETKV_BACKEND_ABI,
                                     sizeof(HetkvBackend),
                                     sizeof(hetkv::remap::Job),
                                     0,
                                     "cuda",
                                     last_error,
                                     device_count,
                                     device_info,
                                     memory_info,
                                     can_access_peer,
                                     enable_peer,
                                     pointer_info,
                                     device_alloc,
                                     device_free,
                                     host_alloc,
                                     host_free,
                                     host_register,
                                     host_unregister,
                                     ipc_export,
                                     ipc_open,
                                     ipc_close,
                                     stream_create,
                                     stream_destroy,
                                     stream_synchronize,
                                     stream_device,
                                     stream_is_capturing,
                                     stream_wait_event,
                                     event_create,
                                     event_destroy,
                                     event_record,
                                     event_query,
                                     event_synchronize,
                                     event_elapsed_us,
                                     exchange_capture_mode,
                                     copy_async,
                                     fill_async,
                                     flush_rdma_writes,
                                     slot_create,
                                     slot_destroy,
                                     remap,
                                     stream_wait_value,
                                     bind_thread};
  return &table;
}

// For the tests: a caller's stream, work of a given length in it, and what is left allocated.
__attribute__((visibility("default"))) void* host_stream(int device) {
  return new Stream(device);
}
__attribute__((visibility("default"))) void host_stream_delay(void* stream, int microseconds) {
  static_cast<Stream*>(stream)->put([=] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); });
}
__attribute__((visibility("default"))) void host_stream_fill(void* stream, void* data, int byte, std::size_t bytes) {
  static_cast<Stream*>(stream)->put([=] { std::memset(data, byte, bytes); });
}
__attribute__((visibility("default"))) void host_stream_copy(void* stream, void* to, const void* from,
                                                             std::size_t bytes) {
  static_cast<Stream*>(stream)->put([=] { std::memcpy(to, from, bytes); });
}
__attribute__((visibility("default"))) void host_stream_capture(void* stream, int on) {
  static_cast<Stream*>(stream)->capturing = on != 0;
}
__attribute__((visibility("default"))) void host_stream_wait(void* stream) {
  static_cast<Stream*>(stream)->wait();
}
__attribute__((visibility("default"))) void host_stream_free(void* stream) {
  delete static_cast<Stream*>(stream);
}
__attribute__((visibility("default"))) std::size_t host_blocks_in_use() {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  return blocks.size();
}
__attribute__((visibility("default"))) void host_options(const char* text) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  options = text;
  broken = false;
  remaps = 0;
  const std::lock_guard<std::mutex> blocks_lock(blocks_mutex);
  used_before = used;
}
}
