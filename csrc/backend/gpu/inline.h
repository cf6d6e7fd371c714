// Functions for the host and the device that must become part of their caller: a call would put a kernel's registers
// and parameters into memory. HETKV_CALL is for what is rare and large.
#pragma once

#include "map.h"

#if defined(__CUDACC__)
#define HETKV_INLINE __host__ __device__ __forceinline__
#define HETKV_CALL inline __host__ __device__ __noinline__
#else
#define HETKV_INLINE HETKV_HD inline __attribute__((always_inline))
#define HETKV_CALL HETKV_HD inline __attribute__((noinline))
#endif

#if defined(__CUDA_ARCH__) || defined(__clang__)
#define HETKV_UNROLL _Pragma("unroll")
#define HETKV_ROLLED _Pragma("unroll 1")
#elif defined(__CUDACC__)
#define HETKV_UNROLL
#define HETKV_ROLLED
#else
#define HETKV_UNROLL _Pragma("GCC unroll 8")
#define HETKV_ROLLED
#endif
