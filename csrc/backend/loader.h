// Finds the GPU backends: opens their shared objects, checks that they were built with this core, keeps them open.
#pragma once

#include <string>
#include <vector>

#include "backend/backend.h"
#include "status.h"

namespace hetkv::backend {

// What became of one backend that was looked for.
struct BackendEntry {
  std::string name;                     // "cuda", "hip"
  const HetkvBackend* table = nullptr;  // null where it cannot be used; it stays valid until the process ends
  std::string why;                      // why not: no such file, no runtime, no driver, another version
  int devices = 0;
};

// Looks in `folder` for `libhetkv_cuda13.so`, `libhetkv_cuda12.so` and `libhetkv_hip.so`, and opens what is there: of
// CUDA the first that has a device, as the newer file needs a newer driver. The first call decides; later ones, from
// any thread and with any folder, return the same list, in the order cuda, hip.
const std::vector<BackendEntry>& load_backends(const std::string& folder);

// Those that the first call found; empty before it.
const std::vector<BackendEntry>& backends();

// The backend of that name. kUnsupported, with the reason, where it cannot be used; kInvalid where the name is unknown.
Status find_backend(const std::string& name, const HetkvBackend** backend);

// For tests: the table in the shared object at `path`, in addition to those of `backends()`.
Status open_backend_at(const std::string& path, const HetkvBackend** backend);

// kOk, or the backend's last error under the code that fits; `what` names the call: "pinning the window of 64 MiB".
Status backend_status(const HetkvBackend& backend, std::int32_t status, const std::string& what);

}  // namespace hetkv::backend
