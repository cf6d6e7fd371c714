// Starts the kernel that has the paths a launch needs. One source file per kernel, so that they compile side by side.
#pragma once

#include "backend/gpu/block.h"
#include "backend/gpu_runtime.h"

namespace hetkv::gpu {

// One launch of up to `max_blocks` thread blocks (0: as many as run at once) on the current device. `scratch` is device
// memory; `results` pinned host memory, one a frame.
template <Paths kPaths>
gpuError_t start(const Launch& launch, int multiprocessors, int max_blocks, Scratch* scratch, HetkvRemapResult* results,
                 gpuStream_t stream);

// Loads the kernels into the current device, which the runtime otherwise does at the first launch, where it waits for
// all work of the device.
template <Paths kPaths>
gpuError_t load();

extern template gpuError_t start<Paths::kMoves>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
extern template gpuError_t start<Paths::kTurns>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
extern template gpuError_t start<Paths::kRows>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
extern template gpuError_t start<Paths::kGroups>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
extern template gpuError_t start<Paths::kAll>(const Launch&, int, int, Scratch*, HetkvRemapResult*, gpuStream_t);
extern template gpuError_t load<Paths::kMoves>();
extern template gpuError_t load<Paths::kTurns>();
extern template gpuError_t load<Paths::kRows>();
extern template gpuError_t load<Paths::kGroups>();
extern template gpuError_t load<Paths::kAll>();

}  // namespace hetkv::gpu
