// Calls of the driver that wait for all work of a device, and hold up every launch of the process meanwhile: cudaFree,
// cudaFreeHost, cudaHostUnregister, cudaIpcCloseMemHandle (docs/decisions/0016-frees.md). While a stream waits for the
// host (StreamGates) such a call could hold up the very remap that the stream waits for, so it is put off until none
// does. One for the process, as its nodes share the driver. Thread safe.
#pragma once

#include <cstddef>
#include <functional>

#include "status.h"

namespace hetkv::engine {

// Runs `call` now, or in the thread whose gates_opened() leaves no stream waiting. It owns all that it needs.
void free_when_no_stream_waits(std::function<void()> call);

// `enqueue` makes one stream wait for the host; no call above runs meanwhile. Where it fails, no stream waits.
Status make_stream_wait(const std::function<Status()>& enqueue);
// So many of those streams have been let through.
void gates_opened(std::size_t count);

}  // namespace hetkv::engine
