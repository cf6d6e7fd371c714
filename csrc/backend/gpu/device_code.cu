// The kernels alone, with no vendor's header: what .ci/gpu compiles for devices whose libraries are not at hand.
#include "backend/gpu/kernel.h"

namespace hetkv::gpu {

template __global__ void remap_kernel<Paths::kMoves, false>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                            HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kMoves, true>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                           HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kTurns, false>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                            HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kTurns, true>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                           HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kRows, false>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                           HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kRows, true>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                          HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kGroups, false>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                             HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kGroups, true>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                            HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kAll, false>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                          HetkvRemapResult*);
template __global__ void remap_kernel<Paths::kAll, true>(HETKV_GRID_CONSTANT const Launch, std::uint32_t, Scratch*,
                                                         HetkvRemapResult*);

}  // namespace hetkv::gpu
