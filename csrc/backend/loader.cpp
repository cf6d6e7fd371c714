#include "backend/loader.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace hetkv::backend {
namespace {

// Backends, and the files that may hold each. Every CUDA file has its runtime inside, which needs a driver of that
// major version or a newer one, so the newest comes first.
struct Vendor {
  const char* name;
  std::vector<const char*> files;
};
const Vendor kVendors[] = {{"cuda", {"cuda13", "cuda12"}}, {"hip", {"hip"}}};

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

// The table and its devices, or why the file cannot be used.
const HetkvBackend* try_file(const std::string& path, int* devices, std::string* why) {
  const HetkvBackend* table = open_table(path, why);
  if (table == nullptr) return nullptr;
  std::int32_t count = 0;
  if (table->device_count(&count) != kHetkvOk) {
    *why = table->last_error();
  } else if (count == 0) {
    *why = "no device";
  } else {
    *devices = count;
    return table;
  }
  return nullptr;
}

BackendEntry open_backend(const Vendor& vendor, const std::string& folder) {
  BackendEntry entry;
  entry.name = vendor.name;
  for (const char* file : vendor.files) {
    const std::string path = folder + "/libhetkv_" + file + ".so";
    if (access(path.c_str(), F_OK) != 0) continue;
    std::string why;
    entry.table = try_file(path, &entry.devices, &why);
    if (entry.table != nullptr) {
      entry.why.clear();
      return entry;
    }
    entry.why += (entry.why.empty() ? "" : "; ") + std::string(file) + ": " + why;
  }
  if (entry.why.empty()) entry.why = "this build has no " + entry.name + " backend in " + folder;
  return entry;
}

}  // namespace

const std::vector<BackendEntry>& load_backends(const std::string& folder) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded.load(std::memory_order_relaxed)) {
    for (const Vendor& vendor : kVendors) found.push_back(open_backend(vendor, folder));
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

}  // namespace hetkv::backend
