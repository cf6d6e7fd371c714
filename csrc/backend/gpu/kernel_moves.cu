#include "backend/gpu/start.h"

namespace hetkv::gpu {

template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
template gpuError_t load<Paths::kMoves>();

}  // namespace hetkv::gpu
