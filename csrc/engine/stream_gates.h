// Lets the caller's streams wait for layers that have not arrived: each wait is for a word of pinned memory that the
// progress thread sets. Thread safe.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "engine/device.h"

namespace hetkv::engine {

class StreamGates {
 public:
  static constexpr std::int32_t kAll = -1;  // in place of a layer: the whole request

  explicit StreamGates(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  // A request whose layers may be waited for.
  void open(std::uint64_t handle);
  // The stream goes on once the layer has arrived, or once the request has ended, however it ended. At once where that
  // has happened.
  Status wait(std::uint64_t handle, std::int32_t layer, void* stream);
  void arrived(std::uint64_t handle, std::int32_t layer);
  void close(std::uint64_t handle);
  // No stream waits for ever.
  void close_all();

 private:
  // Its value only rises, so a word that is used again still lets through who waited for it before.
  struct Word {
    std::uint32_t* host = nullptr;
    std::uint32_t value = 0;
  };
  struct Request {
    std::set<std::int32_t> arrived;
    std::vector<std::pair<std::int32_t, Word>> waiting;
  };
  Status take(Word* word);
  void release(Word word);

  const std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::map<std::uint64_t, Request> requests_;
  std::vector<std::unique_ptr<DeviceBuffer>> pages_;
  std::vector<Word> unused_;
};

}  // namespace hetkv::engine
