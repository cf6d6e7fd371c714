#include "capi/node.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <utility>

#include "backend/loader.h"
#include "engine/device_mover.h"
#include "transport/streams.h"

namespace hetkv::capi {
namespace {

using control::Role;

constexpr std::size_t kMostHandshakes = 64;
constexpr std::uint64_t kSlowestBytesPerMs = 32 << 10;  // of a pack with conversion, as in hetkv/transport/node.py

Result invalid(std::string text) {
  return failure(HETKV_INPUT, std::move(text));
}

// `host` of a description: boot id and host name.
std::string host_id() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return (boot + "/" + name).substr(0, 512);
}

}  // namespace

Node::Node(Role role, std::shared_ptr<const Pool> pool, NodeSettings settings)
    : role_(role), pool_(std::move(pool)), settings_(std::move(settings)) {}

Node::~Node() {
  close();
}

Result Node::create(Role role, std::shared_ptr<const Pool> pool, NodeSettings settings, std::shared_ptr<Node>* out) {
  std::shared_ptr<Node> node(new Node(role, std::move(pool), std::move(settings)));
  Result result = node->start();
  if (result.ok()) *out = std::move(node);
  return result;
}

Result Node::start() {
  engine::EngineConfig config = settings_.engine;
  config.high_priority = !sends();
  config.layer_groups.assign(pool_->spec.layers.size(), -1);
  for (const control::LayerGroup& group : pool_->layers) {
    const auto layer = static_cast<std::size_t>(group.layers[0]);
    config.layer_groups[layer] = static_cast<std::int32_t>(pool_->spec.layers[layer].group);
  }
  engine::Parts parts;
  parts.clock = system_clock();
  parts.transport = std::make_unique<transport::StreamTransport>(parts.clock, nullptr);
  std::string backend = "cpu";
  if (pool_->device != "cpu") {
    const std::size_t colon = pool_->device.find(':');
    backend = pool_->device.substr(0, colon);
    const int index = colon == std::string::npos ? 0 : std::atoi(pool_->device.c_str() + colon + 1);
    backend::load_backends(settings_.backends);
    const HetkvBackend* table = nullptr;
    Status status = backend::find_backend(backend, &table);
    if (status.ok()) status = engine::Device::open(*table, index, &device_);
    if (status.ok()) status = engine::DeviceMover::create(device_, config, parts.clock, &parts.mover);
    if (!status.ok()) return result_of(status);
    parts.device = device_;
  } else {
    parts.mover = std::make_unique<engine::CpuMover>(config.threads, parts.clock);
  }
  if (sends()) {
    sender_ = std::make_unique<engine::Sender>(config, std::move(parts));
  } else {
    receiver_ = std::make_unique<engine::Receiver>(config, std::move(parts));
  }
  const Status status = engine().start();
  if (!status.ok()) return result_of(status);
  if (pipe(stop_) != 0) return failure(HETKV_TRANSPORT, "no descriptors are left");
  control::Description& mine = side_.description;
  mine.role = role_;
  mine.instance = settings_.instance;
  mine.pid = getpid();
  mine.host = host_id();
  mine.engine.resize(16);
  control::fill_random(mine.engine.data(), mine.engine.size());
  mine.spec = pool_->spec;
  mine.shard = pool_->shard();
  mine.layers = pool_->layers;
  mine.slot_bytes = sends() ? 0 : static_cast<std::int64_t>(config.slot_bytes);
  mine.heartbeat_interval_ms = config.heartbeat_ms;
  mine.heartbeat_timeout_ms = config.peer_timeout_ms;
  mine.lease_ms = sends() ? settings_.hold_ms : settings_.lease_ms;
  mine.rank = pool_->rank;
  if (pool_->shards.size() > 1) mine.instance_shards = pool_->shards;
  mine.device = backend;
  mine.fingerprint = settings_.fingerprint;
  side_.secret = settings_.secret;
  side_.timeout_ms = settings_.handshake_timeout_ms;
  const Status checked = mine.check();
  if (!checked.ok()) return invalid(checked.detail);
  dispatcher_ = std::thread([this] { dispatch(); });
  return {};
}

Result Node::listen(const std::string& address, std::string* bound) {
  if (address.empty()) return invalid("an address is missing");
  int port = -1, local = -1;
  Result result = control::listen_at(address, &port, bound);
  if (!result.ok()) return result;
  std::uint8_t number[8];
  control::fill_random(number, sizeof number);
  std::string name = "@hetkv-";
  for (const std::uint8_t byte : number) name += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  std::string ignored;
  const bool has_local = control::listen_at(name, &local, &ignored).ok();
  const std::lock_guard<std::mutex> lock(mutex_);
  if (closed_ || !listening_.empty()) {
    ::close(port);
    if (local >= 0) ::close(local);
    return closed_ ? failure(HETKV_CLOSED, "the node is closed") : invalid("the node listens already");
  }
  listening_.push_back(port);
  if (has_local) {
    side_.description.sockets = {name};
    listening_.push_back(local);
  }
  for (const int descriptor : listening_) acceptors_.emplace_back([this, descriptor] { accept(descriptor); });
  return {};
}

// Each connection in a thread of its own: a silent client holds up nobody else.
void Node::accept(int descriptor) {
  for (;;) {
    pollfd ready[] = {{descriptor, POLLIN, 0}, {stop_[0], POLLIN, 0}};
    if (::poll(ready, 2, -1) < 0 && errno != EINTR) return;
    if (ready[1].revents != 0) return;
    const int found = accept4(descriptor, nullptr, nullptr, SOCK_CLOEXEC);
    if (found < 0) continue;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      ::close(found);
      return;
    }
    for (auto one = handshakes_.begin(); one != handshakes_.end();) {
      if (one->done->load()) {
        one->thread.join();
        one = handshakes_.erase(one);
      } else {
        ++one;
      }
    }
    if (handshakes_.size() >= kMostHandshakes) {
      ::close(found);  // whoever it is may try again
      continue;
    }
    auto done = std::make_shared<std::atomic<bool>>(false);
    handshakes_.push_back({std::thread([this, found, done] {
                             control::Linked link;
                             bool is_stream = false;
                             const Result result = control::serve(control::Channel(found, "a peer that connects"),
                                                                  side_, desk_, &link, &is_stream);
                             if (result.ok() && !is_stream) (void)add(std::move(link));
                             done->store(true);
                           }),
                           done});
  }
}

Result Node::connect(const std::string& address) {
  control::Side side;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    side = side_;
  }
  side.description.sockets.clear();  // streams are dialled by this side
  control::Linked link;
  Result result = control::connect(address, side, &link);
  return result.ok() ? add(std::move(link)) : result;
}

Result Node::add(control::Linked link) {
  auto peer = std::make_shared<Peer>();
  peer->link = std::move(link);
  control::Linked& at = peer->link;
  peer->name = at.theirs.instance + "/" + std::to_string(at.theirs.rank);
  std::shared_ptr<Peer> before;  // another link of the same engine, which has linked again
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [id, known] : peers_) {
      if (known->lost || known->name != peer->name) continue;
      if (known->link.theirs.engine != at.theirs.engine) {
        for (const int descriptor : at.streams) ::close(descriptor);
        return failure(HETKV_INCOMPATIBLE, peer->name + ": instance: another engine of that name and rank is linked");
      }
      before = known;
    }
  }
  if (before) engine().drop_link(before->id, Status::error(Code::kClosed, peer->name + " has linked again"));
  engine::LinkConfig config;
  config.number = at.keys.number;
  config.minor = at.keys.minor;
  config.send_key = at.keys.data_send;
  config.receive_key = at.keys.data_receive;
  config.name = peer->name;
  config.instance = at.theirs.instance;
  config.instance_links = static_cast<std::uint32_t>(at.agreement.ranks.size());
  config.plans = link_plans(*pool_, at.agreement, sends());
  const bool near = at.unix_streams && at.theirs.device == side_.description.device && device_ != nullptr;
  config.device_windows = near && !sends() && !settings_.engine.isolate_peers;
  const std::uint64_t slot =
      std::max<std::uint64_t>(settings_.engine.slot_bytes, static_cast<std::uint64_t>(at.theirs.slot_bytes));
  config.frame_ms = static_cast<std::uint32_t>(slot / kSlowestBytesPerMs);
  for (std::size_t index = 0; index < at.streams.size(); ++index) {
    config.streams.push_back({at.streams[index], at.keys.streams[index].first, at.keys.streams[index].second});
  }
  Status status = engine().add_link(std::move(config), &peer->id);
  for (const int descriptor : at.streams) ::close(descriptor);  // the engine has duplicates
  at.streams.clear();
  if (!status.ok()) return result_of(status);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return failure(HETKV_CLOSED, "the node is closed");
    peers_[peer->id] = peer;
  }
  Result result = at.records.write(at.channel, control::encode_ready(), control::now_ms() + side_.timeout_ms);
  control::Message message;
  if (result.ok()) result = at.records.read(at.channel, &message, control::now_ms() + side_.timeout_ms, "ready");
  if (result.ok() && message.kind != control::MessageKind::kReady) {
    result = failure(HETKV_PEER_LOST, peer->name + ": " + (message.reason.empty() ? "ended the link" : message.reason));
  }
  if (!result.ok()) {
    engine().drop_link(peer->id, Status::error(Code::kPeerLost, result.detail));
    const std::lock_guard<std::mutex> lock(mutex_);
    peers_.erase(peer->id);
    return result;
  }
  engine().activate_link(peer->id);
  const std::lock_guard<std::mutex> lock(mutex_);
  peer->reader = std::thread([this, peer] { read(peer); });
  return {};
}

// Until the connection ends: then nothing of the peer's process touches this side's memory any more.
void Node::read(const std::shared_ptr<Peer>& peer) {
  control::Message message;
  Result result;
  do {
    result = peer->link.records.read(peer->link.channel, &message, 0, "next message");
  } while (result.ok() && message.kind != control::MessageKind::kBye);
  const std::string why = result.ok() ? (message.reason.empty() ? "closed" : message.reason) : result.detail;
  engine().drop_link(peer->id, Status::error(Code::kPeerLost, peer->name + ": " + why));
  if (receiver_) receiver_->retire_link(peer->id);
  const std::lock_guard<std::mutex> lock(mutex_);
  peer->lost = true;
  if (peers_.erase(peer->id) > 0) gone_.push_back(peer);
}

void Node::dispatch() {
  for (;;) {
    const std::vector<engine::Event> events = engine().events().wait();
    if (events.empty()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const engine::Event& event : events) {
      if (event.kind == engine::EventKind::kLinkLost || event.kind == engine::EventKind::kLinkDrained) {
        const auto at = peers_.find(event.link);
        if (at == peers_.end()) continue;
        at->second->lost = true;
        // The connection's end tells the receiver that no store of this side is under way any more.
        if (sends() && event.kind == engine::EventKind::kLinkDrained) at->second->link.channel.wake();
      }
    }
  }
}

std::size_t Node::peers() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::size_t>(
      std::count_if(peers_.begin(), peers_.end(), [](const auto& at) { return !at.second->lost; }));
}

void Node::close() {
  std::vector<std::thread> acceptors;
  std::vector<Handshake> handshakes;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    acceptors.swap(acceptors_);
  }
  if (stop_[1] >= 0) (void)!::write(stop_[1], "x", 1);
  for (std::thread& one : acceptors) one.join();
  if (sender_ || receiver_) engine().stop();
  if (dispatcher_.joinable()) dispatcher_.join();
  std::vector<std::shared_ptr<Peer>> all;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    handshakes.swap(handshakes_);
    for (const auto& [id, peer] : peers_) all.push_back(peer);
    for (const auto& peer : gone_) all.push_back(peer);
    gone_.clear();
  }
  // A connection says that this side touches nothing any more, so the engine has ended before it does.
  for (const auto& peer : all) {
    (void)peer->link.records.write(peer->link.channel, control::encode_bye("closed"), control::now_ms() + 1000);
    peer->link.channel.wake();
  }
  for (Handshake& one : handshakes) one.thread.join();
  for (const auto& peer : all) {
    if (peer->reader.joinable()) peer->reader.join();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  peers_.clear();
  gone_.clear();
  for (const int descriptor : listening_) ::close(descriptor);
  listening_.clear();
  for (int& end : stop_) {
    if (end >= 0) ::close(std::exchange(end, -1));
  }
}

}  // namespace hetkv::capi
