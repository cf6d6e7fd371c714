// Streams that wait for the host (StreamGates), of all nodes of the process, as these share the driver. Thread safe.
// While there is one, calls of the driver are put off that wait for all work of a device and hold up every launch
// meanwhile: cudaFree, cudaFreeHost, cudaHostUnregister, cudaIpcCloseMemHandle (docs/decisions/0016-frees.md). They
// could hold up the very remap that the stream waits for.
#pragma once

#include <functional>
#include <vector>

#include "backend/backend.h"
#include "status.h"

namespace hetkv::engine {

class Device;

struct WaitingStream {
  const HetkvBackend* backend;
  int device;
  void* stream;
};

// Runs `call` now, or in the thread whose streams_go_on() leaves no stream waiting. It owns all that it needs.
void free_when_no_stream_waits(std::function<void()> call);

// `enqueue` makes the stream wait; no call above runs meanwhile. kUnsupported, and nothing was enqueued: with this one
// fewer than two hardware queues of the device would be left, for remaps and for the null stream.
Status make_stream_wait(const Device& device, void* stream, const std::function<Status()>& enqueue);
// These waits, one an element, are over.
void streams_go_on(const std::vector<WaitingStream>& waits);

}  // namespace hetkv::engine
