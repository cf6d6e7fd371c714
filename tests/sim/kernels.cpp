// In place of csrc/remap/isa.cpp: the simulation moves few bytes, by the kernels that every machine has.
#include "remap/isa.h"

namespace hetkv::remap {

const Kernels& kernels() noexcept {
  return kBaselineKernels;
}

}  // namespace hetkv::remap
