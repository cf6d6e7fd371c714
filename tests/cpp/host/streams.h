// Functions of the table about streams, events and work in a stream's order.
#pragma once

#include <chrono>
#include <cstring>
#include <thread>

#include "host/options.h"
#include "host/stream.h"

namespace hetkv::host {

// A kernel has failed: so does all that follows it.
inline std::atomic<bool> broken{false};

inline std::int32_t stream_create(std::int32_t device, std::int32_t, void** stream) {
  *stream = new Stream(device);
  return kHetkvOk;
}

inline std::int32_t stream_destroy(void* stream) {
  delete static_cast<Stream*>(stream);
  return kHetkvOk;
}

inline std::int32_t stream_synchronize(void* stream) {
  static_cast<Stream*>(stream)->wait();
  return kHetkvOk;
}

inline std::int32_t stream_device(void* stream, std::int32_t* device) {
  *device = static_cast<Stream*>(stream)->device;
  return kHetkvOk;
}

inline std::int32_t stream_is_capturing(std::int32_t, void* stream, std::int32_t* capturing) {
  *capturing = static_cast<Stream*>(stream)->capturing ? 1 : 0;
  return kHetkvOk;
}

inline void nap() {
  std::this_thread::sleep_for(std::chrono::microseconds(20));
}

inline std::int32_t stream_wait_event(void* stream, void* handle) {
  static_cast<Stream*>(stream)->put([point = static_cast<Event*>(handle)->point()] {
    while (!point->reached) nap();
  });
  return kHetkvOk;
}

inline std::int32_t event_create(std::int32_t, std::int32_t, void** event) {
  *event = new Event;
  return kHetkvOk;
}

inline std::int32_t event_destroy(void* event) {
  delete static_cast<Event*>(event);
  return kHetkvOk;
}

inline std::int32_t event_record(std::int32_t, void* handle, void* stream) {
  static_cast<Stream*>(stream)->put([point = static_cast<Event*>(handle)->record()] {
    point->failed = broken.load();
    point->at_ns = static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
    point->reached = true;
  });
  return kHetkvOk;
}

inline std::int32_t event_query(void* handle) {
  const auto point = static_cast<Event*>(handle)->point();
  if (!point->reached) return kHetkvNotReady;
  return point->failed ? fail(kHetkvFailed, "a kernel failed") : kHetkvOk;
}

inline std::int32_t event_synchronize(void* handle) {
  while (event_query(handle) == kHetkvNotReady) nap();
  return event_query(handle);
}

inline std::int32_t event_elapsed_us(void* start, void* stop, double* microseconds) {
  const std::uint64_t first = static_cast<Event*>(start)->point()->at_ns;
  *microseconds = static_cast<double>(static_cast<Event*>(stop)->point()->at_ns - first) / 1000;
  return kHetkvOk;
}

inline std::int32_t exchange_capture_mode(std::int32_t, std::int32_t*) {
  return fail(kHetkvUnsupported, "there are no graphs here");
}

inline std::int32_t copy_async(void* dst, const void* src, std::size_t bytes, void* stream) {
  static_cast<Stream*>(stream)->put([=] { std::memcpy(dst, src, bytes); });
  return kHetkvOk;
}

inline std::int32_t fill_async(void* dst, std::int32_t byte, std::size_t bytes, void* stream) {
  static_cast<Stream*>(stream)->put([=] { std::memset(dst, byte, bytes); });
  return kHetkvOk;
}

inline std::int32_t flush_rdma_writes(std::int32_t) {
  return fail(kHetkvUnsupported, "no RDMA here");
}

inline std::int32_t stream_wait_value(std::int32_t, void* stream, const std::uint32_t* word, std::uint32_t value) {
  if (has("no-wait-value")) return fail(kHetkvUnsupported, "streams cannot wait for the host");
  static_cast<Stream*>(stream)->put([=] {
    while (static_cast<std::int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0) nap();
  });
  return kHetkvOk;
}

}  // namespace hetkv::host
