// Lets the caller's streams wait for layers that have not arrived: each wait is for a word of pinned memory that the
// progress thread sets. Thread safe.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/device.h"
#include "engine/frees.h"
#include "engine/outcome.h"

namespace hetkv::engine {

class StreamGates {
 public:
  static constexpr std::int32_t kAll = -1;  // in place of a layer: the whole request

  explicit StreamGates(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~StreamGates() { close_all(); }
  StreamGates(const StreamGates&) = delete;
  StreamGates& operator=(const StreamGates&) = delete;

  // The stream goes on once the layer has arrived, or once the request has ended, however it ended. At once where that
  // has happened. kInvalid: a stream of another device, or one that captures a graph. kUnsupported: the
  // device's streams cannot, or too many wait already (make_stream_wait).
  Status wait(Outcome& outcome, std::int32_t layer, void* stream);
  // Progress thread, after the outcome's own change, and only where it is watched for streams.
  void arrived(const Outcome& outcome, std::int32_t layer);
  void close(const Outcome& outcome);
  // No stream waits for ever.
  void close_all();

 private:
  // Its value only rises, so a word that is used again still lets through who waited for it before.
  struct Word {
    std::uint32_t* host = nullptr;
    std::uint32_t value = 0;
    void* stream = nullptr;  // that waits for it
  };
  using Waiting = std::vector<std::pair<std::int32_t, Word>>;  // by layer
  Status take(Word* word);
  WaitingStream open(Word word);

  const std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, Waiting> waiting_;  // by request
  std::vector<std::unique_ptr<DeviceBuffer>> pages_;
  std::vector<Word> unused_;
};

}  // namespace hetkv::engine
