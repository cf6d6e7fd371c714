// The kernels alone, with no vendor's header: what .ci/gpu compiles for devices whose libraries are not at hand.
#include "backend/gpu/kernel.h"

namespace hetkv::gpu {

template __global__ void remap_kernel<Paths::kMoves>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                     HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kTurns>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                     HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kRows>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                    HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kAll>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                   HetkvRemapResult*);

}  // namespace hetkv::gpu
