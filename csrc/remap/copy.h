// The yardstick of `hetkv bench remap`: the C library's memcpy on the threads that remap_cpu uses.
#pragma once

#include <cstddef>

namespace hetkv::remap {

// Copies `bytes` bytes, an equal contiguous part on each of `threads` threads (the caller's own included).
void copy_cpu(void* dst, const void* src, std::size_t bytes, int threads) noexcept;

}  // namespace hetkv::remap
