// Functions of the backend's table about streams, events and work in a stream's order.
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "backend/gpu/functions.h"
#include "backend/gpu/status.h"

namespace hetkv::gpu {
namespace {

gpuEvent_t as_event(void* event) {
  return static_cast<gpuEvent_t>(event);
}

// Streams that were made ahead. The driver makes a new one only after a stream that waits for the host where it has to
// grow what its streams share: nodes that start while callers' streams wait for transfers take theirs from here.
struct StreamStock {
  using Kind = std::pair<std::int32_t, bool>;  // device, high priority

  std::mutex mutex;
  std::map<Kind, std::vector<gpuStream_t>> idle;
  std::map<gpuStream_t, Kind> taken;
};
constexpr int kMadeAtOnce = 16;  // a node has five

// Never destroyed: its streams belong to the driver when the process ends.
StreamStock& stream_stock() {
  static auto* const stock = new StreamStock;
  return *stock;
}

std::int32_t make_streams(std::int32_t device, bool high_priority, std::vector<gpuStream_t>* made) {
  HETKV_ON(device);
  int least = 0, greatest = 0;
  HETKV_TRY(gpuDeviceGetStreamPriorityRange(&least, &greatest));
  for (int count = 0; count < kMadeAtOnce; ++count) {
    gpuStream_t stream;
    HETKV_TRY(gpuStreamCreateWithPriority(&stream, gpuStreamNonBlocking, high_priority ? greatest : least));
    made->push_back(stream);
  }
  return kHetkvOk;
}

}  // namespace

std::int32_t stream_create(std::int32_t device, std::int32_t high_priority, void** stream) {
  StreamStock& stock = stream_stock();
  const std::lock_guard<std::mutex> lock(stock.mutex);
  const StreamStock::Kind kind{device, high_priority != 0};
  auto& idle = stock.idle[kind];
  if (idle.empty()) {
    const std::int32_t status = make_streams(device, kind.second, &idle);
    if (idle.empty()) return status;
  }
  *stream = idle.back();
  stock.taken.emplace(idle.back(), kind);
  idle.pop_back();
  return kHetkvOk;
}

std::int32_t stream_destroy(void* stream) {
  StreamStock& stock = stream_stock();
  const std::lock_guard<std::mutex> lock(stock.mutex);
  const auto taken = stock.taken.find(as_stream(stream));
  if (taken == stock.taken.end()) return fail(kHetkvInvalid, "a stream that this backend did not make");
  const auto kind = taken->second;
  stock.taken.erase(taken);
  if (gpuStreamQuery(as_stream(stream)) == gpuSuccess) {
    stock.idle[kind].push_back(as_stream(stream));
    return kHetkvOk;
  }
  forget();
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

std::int32_t stream_is_capturing(std::int32_t device, void* stream, std::int32_t* capturing) {
  HETKV_ON(device);
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

std::int32_t event_record(std::int32_t device, void* event, void* stream) {
  HETKV_ON(device);
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

}  // namespace hetkv::gpu
