#include "backend/gpu/start.h"

namespace hetkv::gpu {

template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
