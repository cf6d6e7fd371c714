#include "backend/loader.h"

#include <dlfcn.h>

#include <atomic>
#include <mutex>

namespace hetkv {
namespace {

constexpr const char* kNames[] = {"cuda", "hip"};

std::mutex mutex;
std::vector<BackendEntry> found;
std::atomic<bool> loaded{false};

// The table in the shared object at `path`, or null and the reason.
const HetkvBackend* open_table(const std::string& path, std::string* why) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* text = dlerror();
    *why = text != nullptr ? text : path + " cannot be opened";
    return nullptr;
  }
  const auto entry = reinterpret_cast<HetkvBackendEntry>(dlsym(library, HETKV_BACKEND_SYMBOL));
  const HetkvBackend* table = entry != nullptr ? entry() : nullptr;
  if (table == nullptr) {
    *why = path + " has no " HETKV_BACKEND_SYMBOL;
  } else if (table->abi != HETKV_BACKEND_ABI || table->size != sizeof(HetkvBackend) ||
             table->job_size != sizeof(remap::Job)) {
    *why = path + " was built for another version of hetkv";
    table = nullptr;
  }
  // Never closed: a vendor's runtime does not survive being unloaded.
  return table;
}

BackendEntry open_backend(const std::string& name, const std::string& path) {
  BackendEntry entry;
  entry.name = name;
  const HetkvBackend* table = open_table(path, &entry.why);
  if (table == nullptr) return entry;
  std::int32_t count = 0;
  if (table->device_count(&count) != kHetkvOk) {
    entry.why = table->last_error();
  } else if (count == 0) {
    entry.why = "no device";
  } else {
    entry.table = table;
    entry.devices = count;
  }
  return entry;
}

}  // namespace

const std::vector<BackendEntry>& load_backends(const std::string& folder) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded.load(std::memory_order_relaxed)) {
    for (const char* name : kNames) found.push_back(open_backend(name, folder + "/libhetkv_" + name + ".so"));
    loaded.store(true, std::memory_order_release);
  }
  return found;
}

const std::vector<BackendEntry>& backends() {
  static const std::vector<BackendEntry> none;
  return loaded.load(std::memory_order_acquire) ? found : none;
}

Status find_backend(const std::string& name, const HetkvBackend** backend) {
  for (const BackendEntry& entry : backends()) {
    if (entry.name != name) continue;
    *backend = entry.table;
    if (entry.table != nullptr) return {};
    return Status::error(Code::kUnsupported, "the " + name + " backend cannot be used here: " + entry.why);
  }
  return Status::error(Code::kInvalid, "backend '" + name + "' is not known; known are cuda and hip");
}

Status open_backend_at(const std::string& path, const HetkvBackend** backend) {
  std::string why;
  *backend = open_table(path, &why);
  return *backend != nullptr ? Status{} : Status::error(Code::kInvalid, why);
}

Status backend_status(const HetkvBackend& backend, std::int32_t status, const std::string& what) {
  if (status == kHetkvOk) return {};
  Code code = Code::kTransport;
  if (status == kHetkvInvalid || status == kHetkvOutOfMemory || status == kHetkvNoDevice) code = Code::kInvalid;
  if (status == kHetkvUnsupported) code = Code::kUnsupported;
  const char* text = status == kHetkvNotReady ? "not ready" : backend.last_error();
  return Status::error(code, what + ": " + text + " (" + backend.name + ")");
}

}  // namespace hetkv
