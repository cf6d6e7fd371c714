// What kernels need from a vendor, and nothing else: so that device code compiles without the vendor's headers too.
#pragma once

#include <cstdint>

#if defined(__HIP__) && !defined(__host__)
#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#endif

// Parameters of a kernel stay where they are, even where their address is taken.
#if defined(__CUDACC__)
#define HETKV_GRID_CONSTANT __grid_constant__
#define HETKV_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#define HETKV_GRID_CONSTANT
#define HETKV_LAUNCH_BOUNDS(threads, blocks) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#endif

namespace hetkv::gpu {

#if defined(__HIP__)

#if defined(__GFX8__) || defined(__GFX9__) || !defined(__HIP_DEVICE_COMPILE__)
constexpr std::uint32_t kWarp = 64;
#else
constexpr std::uint32_t kWarp = 32;
#endif

__device__ inline std::uint32_t thread_index() {
  return __builtin_amdgcn_workitem_id_x();
}
__device__ inline std::uint32_t block_index() {
  return __builtin_amdgcn_workgroup_id_x();
}
__device__ inline void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// What this thread, and those that it waited for at a barrier, have done is seen by the other blocks before what
// follows.
__device__ inline void fence() {
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "agent");
}
__device__ inline std::uint64_t add(std::uint64_t* to, std::uint64_t value) {
  return __hip_atomic_fetch_add(to, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ inline std::uint32_t from_lane_above(std::uint32_t value, std::uint32_t distance) {
  const std::uint32_t lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)) + distance;
  return static_cast<std::uint32_t>(__builtin_amdgcn_ds_bpermute(static_cast<int>(lane * 4), static_cast<int>(value)));
}
__device__ inline std::uint32_t from_lane_across(std::uint32_t value, std::uint32_t mask) {
  const std::uint32_t lane = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)) ^ mask;
  return static_cast<std::uint32_t>(__builtin_amdgcn_ds_bpermute(static_cast<int>(lane * 4), static_cast<int>(value)));
}
// Launches of a stream follow each other whole.
__device__ inline void wait_for_launch_before() {}
__device__ inline void let_next_launch_start() {}

#elif defined(__CUDACC__)

constexpr std::uint32_t kWarp = 32;

__device__ inline std::uint32_t thread_index() {
  return threadIdx.x;
}
__device__ inline std::uint32_t block_index() {
  return blockIdx.x;
}
__device__ inline void barrier() {
  __syncthreads();
}
__device__ inline void fence() {
  __threadfence();
}
__device__ inline std::uint64_t add(std::uint64_t* to, std::uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}
// A launch may begin while the one before it in the stream ends: it waits here until that one's writes are visible.
__device__ inline void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline std::uint32_t from_lane_above(std::uint32_t value, std::uint32_t distance) {
  return __shfl_down_sync(0xFFFFFFFFu, value, distance);
}
__device__ inline std::uint32_t from_lane_across(std::uint32_t value, std::uint32_t mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, static_cast<int>(mask));
}

#endif

}  // namespace hetkv::gpu
