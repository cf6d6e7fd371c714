#include "engine/outcome.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <ctime>
#include <utility>

#include "clock.h"

namespace hetkv::engine {
namespace {

constexpr int kLooks = 64;  // between two looks at the clock

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, std::uint64_t ns) {
  const timespec timeout{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  static_cast<void>(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, &timeout, nullptr, 0));
}

}  // namespace

Outcome::Outcome(std::uint64_t number, const wire::RequestId& of, std::size_t num_layers, std::uint64_t spin_ns)
    : handle(number), id(of), spin_ns_(spin_ns), layers_((num_layers + 63) / 64) {}

void Outcome::Word::change() {
  static_assert(sizeof value == sizeof(std::uint32_t));
  if (sleepers.load() == 0) return;
  value.fetch_add(1);
  static_cast<void>(syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0));
}

template <typename There>
bool Outcome::wait_for(Word& word, There there, std::uint64_t deadline_ns, bool slept) const {
  if (there()) return true;
  std::uint64_t now = system_clock()->now_ns();
  const std::uint64_t spin_until = std::min(slept ? now : now + spin_ns_, deadline_ns);
  while (now < spin_until) {
    for (int i = 0; i < kLooks; ++i) {
      if (there()) return true;
      pause_core();
    }
    sched_yield();  // a core that is shared belongs to the thread that is waited for
    now = system_clock()->now_ns();
  }
  word.sleepers.fetch_add(1);
  bool found = false;
  for (;;) {
    const std::uint32_t seen = word.value.load();
    found = there();
    now = system_clock()->now_ns();
    if (found || now >= deadline_ns) break;
    futex_wait(word.value, seen, deadline_ns - now);
  }
  word.sleepers.fetch_sub(1);
  return found;
}

bool Outcome::wait(Phase least, std::uint64_t deadline_ns, bool slept) const {
  return wait_for(phase_changes_, [&] { return phase() >= least; }, deadline_ns, slept);
}

bool Outcome::wait_layer(std::size_t layer, std::uint64_t deadline_ns, bool slept) const {
  return wait_for(layer_changes_, [&] { return arrived(layer) || ended(); }, deadline_ns, slept);
}

void Outcome::arrive(std::size_t layer) {
  if (layer / 64 >= layers_.size()) return;
  layers_[layer / 64].fetch_or(std::uint64_t{1} << layer % 64);
  layer_changes_.change();
}

void Outcome::advance(Phase to) {
  phase_.store(to);
  phase_changes_.change();
  layer_changes_.change();
}

Outcomes::Outcomes(std::size_t num_layers, std::uint64_t spin_ns) : num_layers_(num_layers), spin_ns_(spin_ns) {}

std::shared_ptr<Outcome> Outcomes::open(const wire::RequestId& id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [at, fresh] = open_.try_emplace(id);
  if (!fresh) return nullptr;
  at->second = std::make_shared<Outcome>(next_handle_++, id, num_layers_, spin_ns_);
  return at->second;
}

void Outcomes::end(Outcome& outcome, Status failure) {
  std::shared_ptr<Outcome> kept;  // outlives the lock
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = open_.find(outcome.id);
    if (found == open_.end() || found->second.get() != &outcome) return;
    kept = std::move(found->second);
    open_.erase(found);
    outcome.failure_ = std::move(failure);
    ended_.push_back(outcome.handle);
    any_ended_.store(true);
    outcome.phase_.store(outcome.failure_.ok() ? Phase::kComplete : Phase::kFailed);
  }
  outcome.phase_changes_.change();
  outcome.layer_changes_.change();
}

void Outcomes::forget(const Outcome& outcome) {
  const std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(outcome.id);
}

void Outcomes::end_all(const Status& failure) {
  std::vector<std::shared_ptr<Outcome>> left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [id, outcome] : open_) left.push_back(outcome);
  }
  for (const auto& outcome : left) end(*outcome, failure);
}

std::size_t Outcomes::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return open_.size();
}

std::vector<std::uint64_t> Outcomes::take_ended() {
  if (!any_ended_.load()) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  any_ended_.store(false);
  return std::exchange(ended_, {});
}

}  // namespace hetkv::engine
