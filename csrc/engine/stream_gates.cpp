#include "engine/stream_gates.h"

#include <atomic>
#include <cstring>

#include "engine/frees.h"

namespace hetkv::engine {
namespace {

constexpr std::size_t kPageBytes = 4096;

}  // namespace

Status StreamGates::wait(Outcome& outcome, std::int32_t layer, void* stream) {
  const CaptureGuard guard(*device_);
  if (!device_->can(kHetkvCapStreamWaitValue)) {
    return Status::error(Code::kUnsupported, std::string(device_->info().name) +
                                                 ": its streams cannot wait for the host; wait() on the host instead");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  outcome.watch(Outcome::kWatchStreams);  // what happens from now on comes here, after the lock
  if (outcome.ended() || (layer != kAll && outcome.arrived(static_cast<std::size_t>(layer)))) return {};
  if (auto status = device_->check_caller(stream); !status.ok()) return status;
  Word word;
  if (auto status = take(&word); !status.ok()) return status;
  ++word.value;
  word.stream = stream;
  auto status = make_stream_wait(*device_, stream, [&] {
    return device_->check(device_->backend().stream_wait_value(device_->index(), stream, word.host, word.value),
                          "making the stream wait");
  });
  if (!status.ok()) {
    unused_.push_back(word);
    return status;
  }
  waiting_[outcome.handle].emplace_back(layer, word);
  return {};
}

void StreamGates::arrived(const Outcome& outcome, std::int32_t layer) {
  std::vector<WaitingStream> opened;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = waiting_.find(outcome.handle);
    if (found == waiting_.end()) return;
    Waiting& waiting = found->second;
    for (std::size_t i = 0; i < waiting.size();) {
      if (waiting[i].first != layer) {
        ++i;
        continue;
      }
      opened.push_back(open(waiting[i].second));
      waiting[i] = waiting.back();
      waiting.pop_back();
    }
  }
  streams_go_on(opened);
}

void StreamGates::close(const Outcome& outcome) {
  std::vector<WaitingStream> opened;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = waiting_.find(outcome.handle);
    if (found == waiting_.end()) return;
    for (const auto& [layer, word] : found->second) opened.push_back(open(word));
    waiting_.erase(found);
  }
  streams_go_on(opened);
}

void StreamGates::close_all() {
  std::vector<WaitingStream> opened;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [handle, waiting] : waiting_) {
      for (const auto& [layer, word] : waiting) opened.push_back(open(word));
    }
    waiting_.clear();
  }
  streams_go_on(opened);
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

WaitingStream StreamGates::open(Word word) {
  __atomic_store_n(word.host, word.value, __ATOMIC_RELEASE);
  unused_.push_back(word);
  return {&device_->backend(), device_->index(), word.stream};
}

}  // namespace hetkv::engine
