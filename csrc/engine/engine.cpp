#include "engine/engine.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <future>

namespace hetkv::engine {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kBurstNs = kMs;  // after which messages have their turn

}  // namespace

Engine::Engine(const EngineConfig& config, Parts parts)
    : config_(config),
      clock_(std::move(parts.clock)),
      device_(std::move(parts.device)),
      transport_(std::move(parts.transport)),
      mover_(std::move(parts.mover)),
      outcomes_(config.layer_groups.size(), std::uint64_t{config.spin_us} * 1000),
      trace_(config.trace),
      process_(getpid()) {}

Engine::~Engine() {
  if (wake_fd_ >= 0) close(wake_fd_);
  if (poll_fd_ >= 0) close(poll_fd_);
}

Status Engine::start(bool threaded) {
  if (auto status = transport_->start(this); !status.ok()) return status;
  address_ = transport_->address();
  threaded_ = threaded;
  if (threaded) {
    wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    poll_fd_ = epoll_create1(EPOLL_CLOEXEC);
    if (wake_fd_ < 0 || poll_fd_ < 0) return Status::error(Code::kTransport, "no file descriptor is left");
    for (int fd : {wake_fd_, transport_->event_fd()}) {
      epoll_event event{};
      event.events = EPOLLIN;
      event.data.fd = fd;
      if (epoll_ctl(poll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
        return Status::error(Code::kTransport, "cannot wait on the progress thread's descriptors");
      }
    }
  }
  accepting_ = started_ = true;
  if (threaded) thread_ = std::thread([this] { run(); });
  return {};
}

bool Engine::made_here() const {
  return process_ == getpid();
}

void Engine::stop() {
  if (!started_ || !made_here()) return;
  started_ = false;
  if (threaded_) {
    post([this] { stopping_ = true; });
    thread_.join();
  } else {
    end(Status::error(Code::kClosed, "this side was closed"));
  }
  events_.close();
}

bool Engine::post(std::function<void()> command) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!accepting_) return false;
    commands_.push_back(std::move(command));
    posted_.store(true);
  }
  // Pairs with sleep(): it sets `sleeping_` and then looks at the commands once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (sleeping_.load()) wake();
  return true;
}

void Engine::call(std::function<void()> command) {
  if (!threaded_) return command();
  auto done = std::make_shared<std::promise<void>>();  // broken, so ready, if the engine stops before it runs
  auto future = done->get_future();
  post([command = std::move(command), done = std::move(done)] {
    command();
    done->set_value();
  });
  future.wait();
}

void Engine::wake() {
  const std::uint64_t one = 1;
  static_cast<void>(!write(wake_fd_, &one, sizeof one));
}

void Engine::run() noexcept {
  Status status = Status::error(Code::kClosed, "this side was closed");
  try {
    static_cast<void>(prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0));  // naps of microseconds, not of 50 more
    mover_->enter();
    loop();
  } catch (
      const std::exception& error) {  // out of memory or threads: nothing is left half done that stopping would use
    status = Status::error(Code::kTransport, std::string("the progress thread failed: ") + error.what());
  }
  end(status);
}

void Engine::end(const Status& status) noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    accepting_ = false;
  }
  try {
    drain_commands();
    close_all(status);
  } catch (const std::exception&) {  // as in run(), while stopping; what is left is freed with the engine
  }
  on_ended();
  outcomes_.end_all(status);  // what the failure left over; no caller waits forever
  mover_.reset();
  transport_.reset();
}

void Engine::loop() {
  std::uint64_t busy_ns = now_ns();
  while (!stopping_) {
    const bool moved = turn();
    const std::uint64_t now = now_ns();
    if (moved) {
      busy_ns = now;
    } else if (!(busy() || expecting()) || now - busy_ns > config_.spin_us * 1000ull) {
      if (!check_links(now, true)) sleep(now);
    } else {
      std::this_thread::yield();  // ranks that share a core: the one that waits makes room for the one that moves
    }
  }
}

bool Engine::turn() {
  bool moved = drain_commands();
  const std::uint64_t begin = now_ns();
  for (int i = 0; i < kProgressBurst && transport_->progress(); ++i) {
    moved = true;
    if (!transport_->more() || now_ns() > begin + kBurstNs) break;  // where it codes payloads that is soon
  }
  moved |= drain_messages();
  const std::uint64_t now = now_ns();
  moved |= step(now);
  moved |= check_links(now);
  return moved;
}

void Engine::on_message(std::uint64_t number, const std::uint8_t* data, std::size_t size) {
  // One that is too long is kept long enough to be rejected as such.
  incoming_.push_back({number, {data, data + std::min(size, wire::kMaxMessageBytes + 8)}});
}

void* Engine::on_put(std::uint64_t number, wire::SlotName slot, std::uint64_t offset, std::uint64_t bytes) {
  const auto found = numbers_.find(number);
  if (found == numbers_.end() || found->second->state == LinkState::kDraining) return nullptr;
  found->second->heard_ns = now_ns();
  return place(*found->second, slot, offset, bytes);
}

bool Engine::drain_commands() {
  if (!posted_.load()) return false;  // callers find the lock free
  std::vector<std::function<void()>> commands;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    commands.swap(commands_);
    posted_.store(false);
  }
  for (auto& command : commands) command();
  return !commands.empty();
}

bool Engine::drain_messages() {
  if (incoming_.empty()) return false;
  std::vector<Incoming> messages;
  messages.swap(incoming_);
  for (const auto& message : messages) receive(message);
  return true;
}

void Engine::receive(const Incoming& message) {
  const auto found = numbers_.find(message.link);
  if (found == numbers_.end()) return;
  Link* at = found->second;
  if (at->state == LinkState::kDraining) return;
  wire::Prelude prelude;
  if (auto status = wire::open(message.bytes.data(), message.bytes.size(), at->config.receive_key, &prelude);
      !status.ok()) {
    lose(*at, status);
    return;
  }
  if (prelude.sequence != at->receive_sequence) {
    lose(*at, Status::error(Code::kBadMac, "message number " + std::to_string(prelude.sequence) + " arrived where " +
                                               std::to_string(at->receive_sequence) + " was due: replayed or lost"));
    return;
  }
  ++at->receive_sequence;
  at->heard_ns = now_ns();
  if (at->state == LinkState::kOpening) {  // the peer sends, so it knows the link
    at->state = LinkState::kUp;
    on_link_up(*at);
  }
  if (prelude.type == wire::Type::kHeartbeat) return;
  if (prelude.type == wire::Type::kBye) {
    lose(*at, Status::error(Code::kPeerLost, "the peer ended the link"), false);
    return;
  }
  on_message(*at, prelude, message.bytes.data(), message.bytes.size());
}

void Engine::sleep(std::uint64_t now) {
  sleeping_.store(true);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  bool pending;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    pending = !commands_.empty();
  }
  if (!pending && transport_->arm()) {
    const std::uint64_t due = next_ns(now);
    int wait_ms = due > now ? static_cast<int>((due - now) / kMs) + 1 : 0;
    if (watching() && wait_ms > 0) {
      const timespec nap{0, static_cast<long>(mover_->nap_us()) * 1000};
      pollfd any{poll_fd_, POLLIN, 0};
      static_cast<void>(ppoll(&any, 1, &nap, nullptr));
      wait_ms = 0;
    }
    epoll_event events[2];
    const int ready = epoll_wait(poll_fd_, events, 2, wait_ms);
    for (int i = 0; i < ready; ++i) {
      std::uint64_t count;
      if (events[i].data.fd == wake_fd_) static_cast<void>(!read(wake_fd_, &count, sizeof count));
    }
    stats_.wakeups.fetch_add(1, std::memory_order_relaxed);
  }
  sleeping_.store(false);
}

std::uint64_t Engine::next_ns(std::uint64_t now) const {
  std::uint64_t due = now + (busy() ? 1 : std::min<std::uint64_t>(config_.peer_timeout_ms, 60'000)) * kMs;
  if (const std::uint64_t own = deadline(); own != 0) due = std::min(due, own);
  for (const auto& [id, at] : links_) {
    if (at->up()) {
      due = std::min(due, at->sent_ns + config_.heartbeat_ms * kMs);
    } else if (at->state == LinkState::kDraining) {
      due = std::min(due, now + kMs);
    }
  }
  return due;
}

void Engine::tell_layer(Outcome& outcome, std::uint32_t layer) {
  outcome.arrive(layer);
  const auto at = static_cast<std::int32_t>(layer);
  if (outcome.watched(Outcome::kWatchStreams)) on_arrived(outcome, at);
  if (outcome.watched(Outcome::kWatchLayers)) events_.push({EventKind::kLayer, outcome.handle, 0, at, {}});
}

void Engine::tell_packed(Outcome& outcome) {
  outcome.advance(Phase::kPacked);
  if (outcome.watched(Outcome::kWatchPacked)) events_.push({EventKind::kPacked, outcome.handle, 0, -1, {}});
}

void Engine::tell_end(Outcome& outcome, Status failure) {
  const EventKind kind = failure.ok() ? EventKind::kComplete : EventKind::kFailed;
  outcomes_.end(outcome, failure);
  if (outcome.watched(Outcome::kWatchStreams)) on_arrived(outcome, -1);
  if (!failure.ok() || outcome.watched(Outcome::kWatchEvents))
    events_.push({kind, outcome.handle, 0, -1, std::move(failure)});
}

}  // namespace hetkv::engine
