#include <cstdarg>
#include <cstdio>

#include "backend/gpu/functions.h"
#include "backend/gpu/status.h"

namespace hetkv::gpu {
namespace {

thread_local char error_text[256] = "";

}  // namespace

const char* last_error() {
  return error_text;
}

std::int32_t fail(std::int32_t status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text, sizeof error_text, format, values);
  va_end(values);
  return status;
}

void forget() {
  static_cast<void>(gpuGetLastError());
}

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

}  // namespace hetkv::gpu
