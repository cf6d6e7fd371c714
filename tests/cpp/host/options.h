// What the backend does differently, and what it says of its last failure.
//
// `host_options`, or HETKV_HOST_BACKEND in the environment, a comma-separated list, changes what it does:
//   slow=US        every remap takes at least so long
//   memory=BYTES   device memory that may be allocated from now on (default 1 GiB)
//   no-ipc         ipc_export is unsupported
//   no-peer        ipc_open and enable_peer fail
//   no-register    host_register fails
//   no-wait-value  stream_wait_value is unsupported
//   fail-remap=N   the N-th remap and all later ones fail on the device: their event reports it
//   reject-remap=N the N-th remap is rejected by the driver when it is launched
#pragma once

#include <cstdlib>
#include <mutex>
#include <string>

#include "backend/backend.h"

namespace hetkv::host {

inline thread_local std::string error_text;
inline std::mutex options_mutex;
inline std::string options = std::getenv("HETKV_HOST_BACKEND") != nullptr ? std::getenv("HETKV_HOST_BACKEND") : "";

inline std::int32_t fail(std::int32_t status, const std::string& text) {
  error_text = text;
  return status;
}

// Value of one word of the options: -1 where it is not there, 0 where it has no value.
inline long option(const std::string& name) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  std::string rest = options;
  while (!rest.empty()) {
    const auto end = rest.find(',');
    const std::string word = rest.substr(0, end);
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
    if (word == name) return 0;
    if (word.rfind(name + "=", 0) == 0) return std::atol(word.c_str() + name.size() + 1);
  }
  return -1;
}

inline bool has(const char* name) {
  return option(name) >= 0;
}

inline const char* last_error() {
  return error_text.c_str();
}

}  // namespace hetkv::host
