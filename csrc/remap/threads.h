// A small persistent pool for remap_cpu: the caller works too, idle workers sleep.
#pragma once

namespace hetkv::remap {

// Calls body(context, 0 .. count - 1), each index once, on up to `count` threads; returns when all are done. Where the
// pool is busy with another caller, or a thread cannot be started, the caller does that work itself.
void parallel(int count, void (*body)(void* context, int index) noexcept, void* context) noexcept;

}  // namespace hetkv::remap
