// Functions of a shared library that is opened at run time.
#pragma once

#include <dlfcn.h>

namespace hetkv {

// The function `name` of an open library; false, and null in `out`, where it has none. The caller knows its type.
template <typename F>
bool find_function(void* library, const char* name, F* out) {
  *out = reinterpret_cast<F>(dlsym(library, name));
  return *out != nullptr;
}

}  // namespace hetkv
