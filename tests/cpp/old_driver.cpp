// A backend's table as a host with too old a driver, or without devices, sees it: nothing works but the question for
// devices. With DEVICES=N it has N; then it stands for a file that the driver runs.
#include "backend/backend.h"
#include "remap/remap.h"

namespace {

const char* last_error() {
  return "CUDA driver version is insufficient for CUDA runtime version";
}

std::int32_t device_count(std::int32_t* count) {
#ifdef DEVICES
  *count = DEVICES;
  return kHetkvOk;
#else
  *count = 0;
  return kHetkvFailed;
#endif
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const HetkvBackend* hetkv_backend() {
  static HetkvBackend table{};
  table.abi = HETKV_BACKEND_ABI;
  table.size = sizeof(HetkvBackend);
  table.job_size = sizeof(hetkv::remap::Job);
  table.name = "cuda";
  table.last_error = last_error;
  table.device_count = device_count;
  return &table;
}
