// Which instruction set the CPU kernels use: the widest that this CPU has, or the one that HETKV_ISA names
// (baseline, avx2, avx512; read once).
#pragma once

#include <string>
#include <vector>

#include "remap/kernels.h"
#include "status.h"

namespace hetkv::remap {

// The kernels in use. The first call detects.
const Kernels& kernels() noexcept;

// Names of the instruction sets that this build and this CPU have, narrowest first.
std::vector<std::string> available_isas();

// Uses the named set from now on, for tests and measurements. kInvalid where it is not available.
Status select_isa(const std::string& name);

}  // namespace hetkv::remap
