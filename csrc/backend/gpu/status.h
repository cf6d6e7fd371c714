// What every function of the backend shares: a status with its line of text, the current device of a scope, handles.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/gpu_runtime.h"

namespace hetkv::gpu {

// Sets what `last_error` says to this thread; returns `status`.
__attribute__((format(printf, 2, 3))) std::int32_t fail(std::int32_t status, const char* format, ...);

// Clears the runtime's own note of the last error.
void forget();

// kHetkvOk, or the status that fits; `what` is the vendor's call.
[[nodiscard]] std::int32_t report(gpuError_t error, const char* what);

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

inline gpuStream_t as_stream(void* stream) {
  return static_cast<gpuStream_t>(stream);
}

}  // namespace hetkv::gpu
