#include "engine/engine.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <future>

namespace hetkv {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr int kProgressBurst = 64;
constexpr std::uint64_t kStopMs = 2000;

std::string silence(std::uint64_t ns) {
  return "no message from the peer for " + std::to_string(ns / kMs) + " ms: it stopped, or the network did";
}

}  // namespace

Engine::Engine(const EngineConfig& config) : config_(config), trace_(config.trace) {}

Engine::~Engine() {
  if (wake_fd_ >= 0) close(wake_fd_);
  if (poll_fd_ >= 0) close(poll_fd_);
}

Status Engine::start() {
  auto status = ucx::Worker::create(
      [this](std::uint64_t number, const std::uint8_t* data, std::size_t size) {
        if (size <= wire::kMaxMessageBytes) incoming_.push_back({number, {data, data + size}});
      },
      &worker_);
  if (!status.ok()) return status;
  wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  poll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  for (int fd : {wake_fd_, worker_->event_fd()}) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(poll_fd_, EPOLL_CTL_ADD, fd, &event) != 0) {
      return Status::error(Code::kTransport, "cannot wait on the progress thread's descriptors");
    }
  }
  accepting_ = true;
  thread_ = std::thread([this] { run(); });
  return {};
}

void Engine::stop() {
  if (!thread_.joinable()) return;
  post([this] { stopping_ = true; });
  thread_.join();
  events_.close();
}

void Engine::post(std::function<void()> command) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!accepting_) return;
    commands_.push_back(std::move(command));
  }
  // Pairs with sleep(): it sets `sleeping_` and then looks at the commands once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (sleeping_.load()) wake();
}

void Engine::call(std::function<void()> command) {
  auto done = std::make_shared<std::promise<void>>();  // broken, hence ready, if the engine stops before it runs
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

void Engine::run() {
  std::uint64_t busy_ns = now_ns();
  while (!stopping_) {
    bool moved = drain_commands();
    for (int i = 0; i < kProgressBurst && worker_->progress(); ++i) moved = true;
    moved |= drain_messages();
    const std::uint64_t now = now_ns();
    moved |= step(now);
    moved |= check_links(now);
    if (moved) {
      busy_ns = now;
    } else if (!busy() || now - busy_ns > config_.spin_us * 1000ull) {
      sleep(now);
    }
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    accepting_ = false;
  }
  drain_commands();
  close_all();
}

bool Engine::drain_commands() {
  std::vector<std::function<void()>> commands;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    commands.swap(commands_);
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
  if (at->state == LinkState::kDraining || at->state == LinkState::kGone) return;
  wire::Prelude prelude;
  if (auto status = wire::open(message.bytes.data(), message.bytes.size(), at->config.receive_key, &prelude); !status.ok()) {
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
  if (prelude.type == wire::Type::kHeartbeat) return;
  if (prelude.type == wire::Type::kBye) {
    lose(*at, Status::error(Code::kPeerLost, "the peer closed the link"));
    return;
  }
  on_message(*at, prelude, message.bytes.data(), message.bytes.size());
}

bool Engine::check_links(std::uint64_t now) {
  bool moved = false;
  for (auto& [id, owned] : links_) {
    Link& at = *owned;
    if (at.state == LinkState::kDraining) {
      if (!link_drained(at)) continue;
      if (!at.endpoint->closed()) {
        at.endpoint->close();
      } else {
        at.state = LinkState::kGone;
        on_link_closed(at);
        at.endpoint.reset();
        events_.push({EventKind::kLinkDrained, 0, id, -1, {}});
        moved = true;
      }
    } else if (at.endpoint && at.endpoint->failed()) {
      lose(at, Status::error(Code::kPeerLost, std::string("UCX: ") + ucs_status_string(at.endpoint->failure())));
      moved = true;
    } else if (at.up()) {
      if (now - at.heard_ns > config_.peer_timeout_ms * kMs && now > at.heard_ns) {
        lose(at, Status::error(Code::kPeerLost, silence(now - at.heard_ns)));
        moved = true;
      } else if (now - at.sent_ns >= config_.heartbeat_ms * kMs && now > at.sent_ns) {
        wire::Prelude prelude;
        prelude.type = wire::Type::kHeartbeat;
        send(at, prelude, wire::Heartbeat{now});
      }
    }
  }
  return moved;
}

void Engine::sleep(std::uint64_t now) {
  sleeping_.store(true);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  bool pending;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    pending = !commands_.empty();
  }
  if (!pending && worker_->arm()) {
    int wait_ms = busy() ? 1 : waiting() ? 50 : static_cast<int>(config_.peer_timeout_ms);
    for (auto& [id, at] : links_) {
      if (at->up()) {
        const std::uint64_t due = at->sent_ns + config_.heartbeat_ms * kMs;
        wait_ms = std::min<int>(wait_ms, due > now ? static_cast<int>((due - now) / kMs) + 1 : 0);
      } else if (at->state == LinkState::kDraining) {
        wait_ms = std::min(wait_ms, 1);
      }
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

Link* Engine::link(std::uint32_t id) {
  const auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second.get();
}

void Engine::send(Link& link, wire::Prelude prelude) {
  std::vector<std::uint8_t> message;
  prelude.sequence = link.send_sequence++;
  wire::encode(prelude, link.config.send_key, message);
  transmit(link, std::move(message));
}

void Engine::transmit(Link& link, std::vector<std::uint8_t> message) {
  link.sent_ns = now_ns();
  link.endpoint->send(link.config.number, std::move(message));
}

void Engine::lose(Link& link, const Status& status) {
  if (link.state == LinkState::kDraining || link.state == LinkState::kGone) return;
  link.state = LinkState::kDraining;
  on_link_lost(link, status);
  events_.push({EventKind::kLinkLost, 0, link.id, -1, status});
}

Status Engine::add_link(LinkConfig config, std::uint32_t* id) {
  Status result = Status::error(Code::kClosed, "the engine is closed");
  call([&] {
    auto made = std::make_unique<Link>(next_link_, std::move(config));
    result = ucx::Endpoint::connect(*worker_, made->config.address, &made->endpoint);
    if (!result.ok()) return;
    *id = next_link_++;
    numbers_[made->config.number] = made.get();
    links_.emplace(*id, std::move(made));
  });
  return result;
}

void Engine::activate_link(std::uint32_t id) {
  post([this, id] {
    Link* at = link(id);
    if (at == nullptr || at->state != LinkState::kOpening) return;
    at->state = LinkState::kUp;
    at->heard_ns = now_ns();
    on_link_up(*at);
  });
}

void Engine::drop_link(std::uint32_t id, Status status) {
  post([this, id, status = std::move(status)] {
    if (Link* at = link(id)) lose(*at, status);
  });
}

void Engine::inject(std::uint32_t id, std::vector<std::uint8_t> bytes) {
  post([this, id, bytes = std::move(bytes)]() mutable {
    Link* at = link(id);
    if (at == nullptr || !at->up()) return;
    ++at->send_sequence;
    at->endpoint->send(at->config.number, std::move(bytes));
  });
}

std::uint64_t Engine::next_sequence(std::uint32_t id) {
  std::uint64_t sequence = 0;
  call([&] {
    if (Link* at = link(id)) sequence = at->send_sequence;
  });
  return sequence;
}

void Engine::close_all() {
  for (auto& [id, at] : links_) {
    if (!at->up()) continue;
    wire::Prelude prelude;
    prelude.type = wire::Type::kBye;
    send(*at, prelude);
    for (int i = 0; i < kProgressBurst && worker_->progress(); ++i) {
    }
    lose(*at, Status::error(Code::kClosed, "closed"));
  }
  on_stop();
  // Every operation must have ended before the memory under it goes; force-closed endpoints end them at once.
  const std::uint64_t deadline = now_ns() + kStopMs * kMs;
  bool open = true;
  while ((open || busy()) && now_ns() < deadline) {
    worker_->progress();
    step(now_ns());
    open = false;
    for (auto& [id, at] : links_) {
      if (!at->endpoint || at->endpoint->closed()) continue;
      if (link_drained(*at)) at->endpoint->close();
      open = true;
    }
  }
  for (auto& [id, at] : links_) on_link_closed(*at);
  step(now_ns());
  numbers_.clear();
  links_.clear();
  incoming_.clear();
}

}  // namespace hetkv
