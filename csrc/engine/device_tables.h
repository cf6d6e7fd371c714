// Small constants that kernels read: block tables, one upload for each request and cache group, and scale multipliers.
// They are in device memory with a pinned twin to upload from. Progress thread only.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/device.h"
#include "engine/mover.h"

namespace hetkv::engine {

class DeviceTables {
 public:
  // Uploads go in the order of `stream`, which outlives the object.
  DeviceTables(std::shared_ptr<Device> device, void* stream) : device_(std::move(device)), stream_(stream) {}

  // Allocates the memory that most engines ever need, so that a lack of it shows at the start.
  Status reserve() { return grow(0); }

  // Where the table will be readable once `upload` has returned, for as long as a task holds `blocks`: in device
  // memory. With `once`, for a launch too small to be worth an upload, in pinned host memory where it was not uploaded
  // before.
  Status find(const BlockTable& blocks, bool once, const std::int32_t** out);
  // The same for `count` multipliers; these are few and alike, and are kept.
  Status find(const float* multipliers, std::size_t count, const float** out);
  // Copies what is new, with one copy where it is contiguous; readable in the order of `reader` from now on.
  Status upload(void* reader);

 private:
  struct Place {
    std::size_t chunk = 0;
    std::size_t offset = 0;
    std::size_t bytes = 0;  // a power of two
  };
  struct Entry {
    std::weak_ptr<const std::vector<std::int32_t>> owner;
    Place place;
    bool uploaded = false;  // or about to be
  };
  struct Chunk {
    std::unique_ptr<DeviceBuffer> device;
    std::unique_ptr<DeviceBuffer> twin;
    std::size_t bytes = 0;
    std::size_t used = 0;
  };
  Status put(const void* data, std::size_t bytes, Place* place);
  Status take(std::size_t bytes, Place* place);
  Status grow(std::size_t bytes);
  void sweep();
  void* twin(const Place& place) const {
    return static_cast<std::uint8_t*>(chunks_[place.chunk].twin->data()) + place.offset;
  }
  std::uint64_t address(const Place& place) const { return chunks_[place.chunk].device->address() + place.offset; }

  const std::shared_ptr<Device> device_;
  void* const stream_;
  std::vector<Chunk> chunks_;
  std::map<std::size_t, std::vector<Place>> unused_;  // by size
  std::unordered_map<const void*, Entry> entries_;
  std::map<std::vector<float>, Place> constants_;
  std::vector<Place> fresh_;  // not copied yet, or not asked to be
  After uploaded_;            // after the last copy
  std::size_t sweep_at_ = 64;
};

}  // namespace hetkv::engine
