#include "engine/stream_gates.h"

#include <atomic>
#include <cstring>

namespace hetkv::engine {
namespace {

constexpr std::size_t kPageBytes = 4096;

}  // namespace

void StreamGates::open(std::uint64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  requests_[handle];
}

Status StreamGates::wait(std::uint64_t handle, std::int32_t layer, void* stream) {
  const CaptureGuard guard(*device_);
  if (!device_->can(kHetkvCapStreamWaitValue)) {
    return Status::error(Code::kUnsupported, std::string(device_->info().name) +
                                                 ": its streams cannot wait for the host; wait() on the host instead");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = requests_.find(handle);
  if (found == requests_.end() || found->second.arrived.count(layer) != 0) return {};
  Word word;
  if (auto status = take(&word); !status.ok()) return status;
  ++word.value;
  auto status = device_->check(device_->backend().stream_wait_value(device_->index(), stream, word.host, word.value),
                               "making the stream wait");
  if (!status.ok()) {
    release(word);
    return status;
  }
  found->second.waiting.emplace_back(layer, word);
  return {};
}

void StreamGates::arrived(std::uint64_t handle, std::int32_t layer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = requests_.find(handle);
  if (found == requests_.end()) return;
  found->second.arrived.insert(layer);
  auto& waiting = found->second.waiting;
  for (std::size_t i = 0; i < waiting.size();) {
    if (waiting[i].first != layer) {
      ++i;
      continue;
    }
    release(waiting[i].second);
    waiting[i] = waiting.back();
    waiting.pop_back();
  }
}

void StreamGates::close(std::uint64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = requests_.find(handle);
  if (found == requests_.end()) return;
  for (auto& [layer, word] : found->second.waiting) release(word);
  requests_.erase(found);
}

void StreamGates::close_all() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [handle, request] : requests_) {
    for (auto& [layer, word] : request.waiting) release(word);
  }
  requests_.clear();
}

Status StreamGates::take(Word* word) {
  if (unused_.empty()) {
    std::unique_ptr<DeviceBuffer> page;
    if (auto status = DeviceBuffer::pinned(device_, kPageBytes, &page); !status.ok()) return status;
    std::memset(page->data(), 0, kPageBytes);
    auto* words = static_cast<std::uint32_t*>(page->data());
    for (std::size_t i = 0; i < kPageBytes / sizeof *words; ++i) unused_.push_back({words + i, 0});
    pages_.push_back(std::move(page));
  }
  *word = unused_.back();
  unused_.pop_back();
  return {};
}

void StreamGates::release(Word word) {
  __atomic_store_n(word.host, word.value, __ATOMIC_RELEASE);
  unused_.push_back(word);
}

}  // namespace hetkv::engine
