// The vendor's runtime under neutral names: only what the backend uses. What one vendor lacks has no alias; the backend
// asks HETKV_HIP and reports a missing capability.
#pragma once

#if defined(HETKV_EMULATED)
#include "emulated_runtime.h"
#elif defined(__HIP__) || defined(__HIPCC__)
#include "backend/hip/runtime.h"
#else
#include "backend/cuda/runtime.h"
#endif
