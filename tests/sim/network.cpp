#include "network.h"

#include <algorithm>
#include <cstring>

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostLanding = 20 * kMs;   // of what a dead process has put
constexpr std::uint64_t kFailsWithin = 400 * kMs;  // how long a transport may take to see a cut

Status lost(const char* why) {
  return Status::error(Code::kPeerLost, why);
}

}  // namespace

void AddressSpace::unmap(std::uint64_t address, std::size_t bytes) {
  for (auto [at, end] = ranges_.equal_range(address); at != end; ++at) {
    if (at->second == bytes) {
      ranges_.erase(at);
      return;
    }
  }
}

bool AddressSpace::holds(std::uint64_t address, std::size_t bytes) const {
  auto at = ranges_.upper_bound(address);
  if (at == ranges_.begin()) return false;
  --at;
  return address + bytes <= at->first + at->second;
}

// --- Network

Reach Network::reach(std::uint64_t sender, std::uint64_t receiver) const {
  return static_cast<Reach>(mix(salt_ ^ (sender << 20) ^ receiver) % 3);
}

void Network::cut(std::uint64_t a, std::uint64_t b, std::uint64_t until) {
  cuts_[std::minmax(a, b)] = until;
  for (const auto& [here, there] : {std::make_pair(a, b), std::make_pair(b, a)}) {
    world.after(world.random.below(kFailsWithin), [this, here = here, there = there] {
      SimTransport* transport = cut_until(here, there) > world.now() ? find(here) : nullptr;
      if (transport == nullptr || !world.random.chance(0.5)) return;
      for (const auto& [link, endpoint] : transport->endpoints()) {
        if (endpoint->peer() == there) endpoint->fail(lost("simulated: the network is cut"));
      }
    });
  }
}

std::uint64_t Network::cut_until(std::uint64_t a, std::uint64_t b) const {
  const auto found = cuts_.find(std::minmax(a, b));
  return found == cuts_.end() ? 0 : found->second;
}

SimTransport* Network::find(std::uint64_t process) const {
  const auto found = transports_.find(process);
  return found == transports_.end() ? nullptr : found->second;
}

// --- memory

SimPeerMemory::SimPeerMemory(SimEndpoint& endpoint, wire::SlotName slot, std::uint64_t region, Reach reach, bool map)
    : endpoint_(endpoint), slot_(slot), region_(region), bytes_(endpoint.network_.regions.at(region).bytes) {
  ++endpoint_.memories_;
  rma_ = reach == Reach::kRma;
  if (map && reach == Reach::kStore) {
    local_ = reinterpret_cast<std::uint64_t>(bytes_->data());
    endpoint_.transport_.site_.space.map(local_, bytes_->size());
  }
}

SimPeerMemory::~SimPeerMemory() {
  --endpoint_.memories_;
  if (local_ != 0) endpoint_.transport_.site_.space.unmap(local_, bytes_->size());
}

SimMemory::SimMemory(Network& network, Site& site, std::size_t bytes)
    : network_(network), site_(site), region_(network.next_region++) {
  auto memory = std::make_shared<Bytes>(bytes);
  for (auto& byte : *memory) byte = static_cast<std::uint8_t>(network.world.random.next());
  address_ = reinterpret_cast<std::uint64_t>(memory->data());
  bytes_ = bytes;
  site_.space.map(address_, bytes_);
  network_.regions[region_] = {std::move(memory), true};
}

SimMemory::~SimMemory() {
  site_.space.unmap(address_, bytes_);
  network_.regions.at(region_).registered = false;
}

// --- SimTransport

SimTransport::SimTransport(Network& network, Site& site) : network_(network), site_(site), address_(sizeof site.id) {
  std::memcpy(address_.data(), &site.id, sizeof site.id);
}

SimTransport::~SimTransport() {
  if (!endpoints_.empty()) network_.world.violate("a transport was destroyed before its endpoints");
  network_.transports_.erase(site_.id);
}

Status SimTransport::start(transport::Sink* sink) {
  sink_ = sink;
  network_.transports_[site_.id] = this;
  return {};
}

void SimTransport::close() {
  if (over_) return;
  over_ = true;
  for (const auto& [link, endpoint] : endpoints_) {
    endpoint->closing_ = endpoint->closed_ = true;
    while (!endpoint->puts_.empty()) endpoint->end(endpoint->puts_.front(), lost("the transport was closed"));
  }
  end_operations();
}

// What is left completes operations, or is dropped.
void SimTransport::end_operations() {
  while (!inbox_.empty()) {
    Item item = std::move(inbox_.front());
    inbox_.pop_front();
    if (item.ends) item.action();
  }
}

Status SimTransport::connect(const transport::PeerAddress& peer, std::unique_ptr<transport::Endpoint>* out) {
  *out = std::make_unique<SimEndpoint>(network_, *this, peer);
  return {};
}

bool SimTransport::progress() {
  if (inbox_.empty()) return goes_on_ && !dead_ && network_.world.step();
  Item item = std::move(inbox_.front());
  inbox_.pop_front();
  item.action();
  return true;
}

Status SimTransport::allocate(std::size_t bytes, std::unique_ptr<transport::Memory>* out) {
  if (network_.chance(network_.profile.no_memory)) {
    if (network_.on_damage) network_.on_damage(site_.id, site_.id);
    return Status::error(Code::kTransport, "simulated: no memory is left");
  }
  *out = std::make_unique<SimMemory>(network_, site_, bytes);
  return {};
}

void SimTransport::die() {
  dead_ = true;
  network_.transports_.erase(site_.id);
  end_operations();
  for (const auto& [link, endpoint] : endpoints_) {
    for (const auto& put : std::list<std::shared_ptr<Put>>(endpoint->puts_)) {
      // What the device has read already may land yet.
      const Network::Region& region = network_.regions.at(put->region);
      if (network_.world.random.chance(0.5) && region.registered && !put->ended) {
        Bytes copy(put->source, put->source + network_.world.random.below(put->size + 1));
        network_.world.after(network_.world.random.below(kMostLanding),
                             [&network = network_, id = put->region, copy, from = site_.id] {
                               const Network::Region& there = network.regions.at(id);
                               if (!there.registered) return;
                               network.on_write(from, reinterpret_cast<std::uint64_t>(there.bytes->data()));
                               std::memcpy(there.bytes->data(), copy.data(), copy.size());
                             });
      }
      endpoint->end(put, lost("the process died"));
    }
  }
}

SimEndpoint* SimTransport::endpoint(std::uint64_t link) const {
  const auto found = endpoints_.find(link);
  return found == endpoints_.end() ? nullptr : found->second;
}

void SimTransport::post(bool ends, std::function<void()> action) {
  inbox_.push_back({ends, std::move(action)});
  site_.wake();
}

}  // namespace hetkv::sim
