#include "engine/device_tables.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace hetkv::engine {
namespace {

constexpr std::size_t kChunkBytes = 1 << 20;
constexpr std::size_t kSmallest = 256;

}  // namespace

Status DeviceTables::find(const BlockTable& blocks, bool once, const std::int32_t** out) {
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
    if (auto status = put(blocks->data(), bytes, &entry.place); !status.ok()) return status;
    found = entries_.emplace(blocks.get(), std::move(entry)).first;
  }
  Entry& entry = found->second;
  if (once && !entry.uploaded) {
    *out = static_cast<const std::int32_t*>(twin(entry.place));
    return {};
  }
  if (!std::exchange(entry.uploaded, true)) fresh_.push_back(entry.place);
  *out = reinterpret_cast<const std::int32_t*>(address(entry.place));
  return {};
}

Status DeviceTables::find(const float* multipliers, std::size_t count, const float** out) {
  std::vector<float> values(multipliers, multipliers + count);
  auto found = constants_.find(values);
  if (found == constants_.end()) {
    Place place;
    if (auto status = put(multipliers, count * sizeof(float), &place); !status.ok()) return status;
    fresh_.push_back(place);
    found = constants_.emplace(std::move(values), place).first;
  }
  *out = reinterpret_cast<const float*>(address(found->second));
  return {};
}

Status DeviceTables::upload(void* reader) {
  const HetkvBackend& backend = device_->backend();
  if (!fresh_.empty()) {
    std::sort(fresh_.begin(), fresh_.end(),
              [](const Place& a, const Place& b) { return std::tie(a.chunk, a.offset) < std::tie(b.chunk, b.offset); });
    for (std::size_t i = 0; i < fresh_.size();) {
      const Place first = fresh_[i];
      std::size_t end = first.offset + first.bytes;
      for (++i; i < fresh_.size() && fresh_[i].chunk == first.chunk && fresh_[i].offset == end; ++i) {
        end += fresh_[i].bytes;
      }
      auto status = device_->check(
          backend.copy_async(reinterpret_cast<void*>(address(first)), twin(first), end - first.offset, stream_),
          "uploading block tables");
      if (!status.ok()) return status;
    }
    fresh_.clear();
    if (auto status = device_->record(stream_, false, &uploaded_); !status.ok()) return status;
  }
  // A reader in another stream waits for the last copy, and so for all.
  if (reader == stream_ || uploaded_ == nullptr) return {};
  if (uploaded_->happened()) {
    uploaded_.reset();
    return {};
  }
  return device_->check(backend.stream_wait_event(reader, uploaded_->handle()), "ordering two streams");
}

Status DeviceTables::put(const void* data, std::size_t bytes, Place* place) {
  if (auto status = take(std::max<std::size_t>(bytes, 1), place); !status.ok()) return status;
  if (bytes > 0) std::memcpy(twin(*place), data, bytes);
  return {};
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
    if (at->second.owner.expired()) {
      unused_[at->second.place.bytes].push_back(at->second.place);
      at = entries_.erase(at);
    } else {
      ++at;
    }
  }
  sweep_at_ = std::max<std::size_t>(64, 2 * entries_.size());
}

}  // namespace hetkv::engine
