#include "engine/device_tables.h"

#include <algorithm>
#include <cstring>

namespace hetkv::engine {
namespace {

constexpr std::size_t kChunkBytes = 1 << 20;
constexpr std::size_t kSmallest = 256;

}  // namespace

Status DeviceTables::find(const BlockTable& blocks, void* reader, const std::int32_t** out) {
  auto found = entries_.find(blocks.get());
  if (found != entries_.end() && found->second.owner.expired()) {  // another table had this address
    unused_[found->second.place.bytes].push_back(found->second.place);
    entries_.erase(found);
    found = entries_.end();
  }
  if (found == entries_.end()) {
    sweep();
    Entry entry;
    entry.owner = blocks;
    const std::size_t bytes = blocks->size() * sizeof(std::int32_t);
    if (auto status = upload(blocks->data(), bytes, &entry.place, &entry.uploaded); !status.ok()) return status;
    found = entries_.emplace(blocks.get(), std::move(entry)).first;
  }
  *out = reinterpret_cast<const std::int32_t*>(address(found->second.place));
  return order(found->second.uploaded, reader);
}

Status DeviceTables::find(const float* multipliers, std::size_t count, void* reader, const float** out) {
  std::vector<float> values(multipliers, multipliers + count);
  auto found = constants_.find(values);
  if (found == constants_.end()) {
    Constant constant;
    if (auto status = upload(multipliers, count * sizeof(float), &constant.place, &constant.uploaded); !status.ok()) {
      return status;
    }
    found = constants_.emplace(std::move(values), std::move(constant)).first;
  }
  *out = reinterpret_cast<const float*>(address(found->second.place));
  return order(found->second.uploaded, reader);
}

// A reader in another stream than the upload's waits for it there.
Status DeviceTables::order(const After& uploaded, void* reader) {
  if (reader == stream_ || uploaded->happened()) return {};
  return device_->check(device_->backend().stream_wait_event(reader, uploaded->handle()), "ordering two streams");
}

Status DeviceTables::upload(const void* data, std::size_t bytes, Place* place, After* uploaded) {
  if (auto status = take(std::max<std::size_t>(bytes, 1), place); !status.ok()) return status;
  const Chunk& chunk = chunks_[place->chunk];
  void* twin = static_cast<std::uint8_t*>(chunk.twin->data()) + place->offset;
  if (bytes > 0) std::memcpy(twin, data, bytes);
  auto* target = reinterpret_cast<void*>(address(*place));
  auto status = device_->check(device_->backend().copy_async(target, twin, bytes, stream_), "uploading a block table");
  if (status.ok()) status = device_->record(stream_, false, uploaded);
  return status;
}

Status DeviceTables::take(std::size_t bytes, Place* place) {
  std::size_t size = kSmallest;
  while (size < bytes) size *= 2;
  auto& unused = unused_[size];
  if (!unused.empty()) {
    *place = unused.back();
    unused.pop_back();
    return {};
  }
  if (chunks_.empty() || chunks_.back().bytes - chunks_.back().used < size) {
    if (auto status = grow(size); !status.ok()) return status;
  }
  Chunk& chunk = chunks_.back();
  *place = {chunks_.size() - 1, chunk.used, size};
  chunk.used += size;
  return {};
}

Status DeviceTables::grow(std::size_t bytes) {
  Chunk chunk;
  chunk.bytes = std::max(bytes, kChunkBytes);
  if (auto status = DeviceBuffer::device(device_, chunk.bytes, &chunk.device); !status.ok()) return status;
  if (auto status = DeviceBuffer::pinned(device_, chunk.bytes, &chunk.twin); !status.ok()) return status;
  chunks_.push_back(std::move(chunk));
  return {};
}

// Takes back the places of tables that no request and no task has any more: every launch that read them has ended.
void DeviceTables::sweep() {
  if (entries_.size() < sweep_at_) return;
  for (auto at = entries_.begin(); at != entries_.end();) {
    if (at->second.owner.expired() && at->second.uploaded->happened()) {
      unused_[at->second.place.bytes].push_back(at->second.place);
      at = entries_.erase(at);
    } else {
      ++at;
    }
  }
  sweep_at_ = std::max<std::size_t>(64, 2 * entries_.size());
}

}  // namespace hetkv::engine
