#include "remap/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace hetkv::remap {
namespace {

int count_available(const Kernels* sets[3]) {
  int count = 0;
  sets[count++] = &kBaselineKernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")) {
    sets[count++] = &kAvx2Kernels;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi")) {
      sets[count++] = &kAvx512Kernels;
    }
  }
#endif
  return count;
}

const Kernels* find(const char* name) {
  const Kernels* sets[3];
  for (int i = count_available(sets); i-- > 0;) {
    if (name == nullptr || std::strcmp(sets[i]->name, name) == 0) return sets[i];
  }
  return nullptr;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() noexcept {
  const Kernels* set = in_use.load(std::memory_order_acquire);
  if (set == nullptr) {
    set = find(std::getenv("HETKV_ISA"));
    if (set == nullptr) set = find(nullptr);  // a name that this machine does not have: the widest
    in_use.store(set, std::memory_order_release);
  }
  return *set;
}

std::vector<std::string> available_isas() {
  const Kernels* sets[3];
  const int count = count_available(sets);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
  return names;
}

Status select_isa(const std::string& name) {
  const Kernels* set = find(name.c_str());
  if (set == nullptr) return Status::error(Code::kInvalid, "instruction set '" + name + "' is not available here");
  in_use.store(set, std::memory_order_release);
  return {};
}

}  // namespace hetkv::remap
