#include "backend/gpu/start.h"

namespace hetkv::gpu {

template gpuError_t start<Paths::kGroups>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t load<Paths::kGroups>();

}  // namespace hetkv::gpu
