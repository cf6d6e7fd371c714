#include "transport/ucx.h"

#include <dlfcn.h>

#include <string>

#include "system_library.h"

namespace hetkv::transport {

#ifdef HETKV_WITH_UCX
namespace {

Ucx table;
bool loaded = false;

}  // namespace

Status load_ucx(const char* path) {
  if (loaded) return {};
  void* library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) return Status::error(Code::kTransport, std::string("UCX: ") + dlerror());
  const char* missing = nullptr;
#define HETKV_FIND(name) \
  if (!find_function(library, #name, &table.name)) missing = #name;
  HETKV_UCX_FUNCTIONS(HETKV_FIND)
  HETKV_FIND(ucs_status_string)
#undef HETKV_FIND
  if (missing != nullptr) return Status::error(Code::kTransport, std::string(path) + " has no " + missing);
  loaded = true;
  return {};
}

const Ucx* ucx() {
  return loaded ? &table : nullptr;
}

#else

Status load_ucx(const char*) {
  return Status::error(Code::kTransport, "hetkv was built without UCX's headers: it has no RDMA");
}

#endif

}  // namespace hetkv::transport
