#include "engine/turns.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/engine.h"

namespace hetkv::engine {
namespace {

constexpr int kStandBackMs = 1;

}  // namespace

Turns::~Turns() {
  if (wake_fd_ >= 0) close(wake_fd_);
}

Status Turns::start(Engine* engine, bool by_callers) {
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0) return Status::error(Code::kTransport, "no file descriptor is left");
  const std::lock_guard<std::mutex> lock(mutex_);
  engine_ = engine;
  process_ = getpid();
  by_callers_ = by_callers;
  return {};
}

void Turns::wake() {
  const std::uint64_t one = 1;
  static_cast<void>(!write(wake_fd_, &one, sizeof one));
}

// Each of three says something and then looks at what the others have said, all in one total order: who posts sets
// `posted_` and looks for a caller and a sleeper, a caller that leaves clears `taken_` and looks for commands and a
// sleeper, the progress thread sets `sleeping_` and looks for commands and a caller.
void Turns::post() {
  posted_.store(true);
  if (!taken_.load() && sleeping_.load()) wake();
}

void Turns::rouse() {
  if (sleeping_.load()) wake();
}

void Turns::fall_asleep() {
  sleeping_.store(true);
}

void Turns::wake_up() {
  std::uint64_t count;
  sleeping_.store(false);
  static_cast<void>(!read(wake_fd_, &count, sizeof count));
}

void Turns::stand_back() {
  fall_asleep();
  if (taken_.load()) {
    pollfd woken{wake_fd_, POLLIN, 0};
    static_cast<void>(poll(&woken, 1, kStandBackMs));
  }
  wake_up();
}

bool Turns::enter(int process) {
  if (!by_callers_ || process != process_ || taken_.exchange(true)) return false;
  left_over_ = true;
  return true;
}

bool Turns::take() {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  return lock.owns_lock() && engine_ != nullptr && engine_->caller_turn(&left_over_);
}

void Turns::leave() {
  const bool left_over = left_over_;
  taken_.store(false);
  if ((left_over || posted_.load()) && sleeping_.load()) wake();
}

bool CallerTurns::enter() {
  if (!mine_ && turns_ != nullptr) mine_ = turns_->enter(getpid());
  return mine_;
}

}  // namespace hetkv::engine
