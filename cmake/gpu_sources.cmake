# Sources of a GPU backend, from the project's root; one list for CUDA and HIP.
set(gpu_sources csrc/backend/gpu/backend.cu csrc/backend/gpu/status.cu csrc/backend/gpu/devices.cu
                csrc/backend/gpu/allocations.cu csrc/backend/gpu/streams.cu csrc/backend/gpu/remaps.cu
                csrc/backend/gpu/kernel_moves.cu csrc/backend/gpu/kernel_turns.cu
                csrc/backend/gpu/kernel_rows.cu csrc/backend/gpu/kernel_groups.cu
                csrc/backend/gpu/kernel_all.cu csrc/backend/gpu/plan.cpp)
