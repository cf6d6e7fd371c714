#include "backend/gpu/start.h"

namespace hetkv::gpu {

template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, RemapResult*, gpuStream_t);

}  // namespace hetkv::gpu
