// Functions of the backend's table about streams, events and work in a stream's order.
#include "backend/gpu/functions.h"
#include "backend/gpu/status.h"
#include "backend/gpu/stock.h"

namespace hetkv::gpu {
namespace {

gpuEvent_t as_event(void* event) {
  return static_cast<gpuEvent_t>(event);
}

std::int32_t make_stream(bool high_priority, gpuStream_t* made) {
  int least = 0, greatest = 0;
  HETKV_TRY(gpuDeviceGetStreamPriorityRange(&least, &greatest));
  HETKV_TRY(gpuStreamCreateWithPriority(made, gpuStreamNonBlocking, high_priority ? greatest : least));
  return kHetkvOk;
}

std::int32_t make_event(bool timed, gpuEvent_t* made) {
  HETKV_TRY(gpuEventCreateWithFlags(made, timed ? gpuEventDefault : gpuEventDisableTiming));
  return kHetkvOk;
}

// A node has five streams, and an event for each bundle under way.
auto& streams = *new Stock<gpuStream_t>(make_stream, 16);
auto& events = *new Stock<gpuEvent_t>(make_event, 64);

}  // namespace

std::int32_t stream_create(std::int32_t device, std::int32_t high_priority, void** stream) {
  return streams.take(device, high_priority != 0, stream);
}

std::int32_t stream_destroy(void* stream) {
  const bool idle = gpuStreamQuery(as_stream(stream)) == gpuSuccess;
  if (!idle) forget();
  const std::int32_t status = streams.give_back(as_stream(stream), idle);
  if (idle || status != kHetkvOk) return status;
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
  return events.take(device, timed != 0, event);
}

std::int32_t event_destroy(void* event) {
  return events.give_back(as_event(event), true);
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
