// The simulated link of two processes: messages and pieces of puts, in order, with what may befall them.
#include <algorithm>
#include <cstring>
#include <utility>

#include "network.h"

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostClose = kMs;  // from close() to closed()

Status lost(const char* why) {
  return Status::error(Code::kPeerLost, why);
}

}  // namespace

SimEndpoint::SimEndpoint(Network& network, SimTransport& transport, const transport::PeerAddress& peer)
    : network_(network),
      transport_(transport),
      peer_([&] {
        std::uint64_t id = 0;
        std::memcpy(&id, peer.address.data(), std::min(sizeof id, peer.address.size()));
        return id;
      }()),
      link_(peer.link),
      stream_(std::make_shared<Stream>()) {
  stream_->from = transport.site_.id;
  stream_->to = peer_;
  stream_->link = link_;
  transport_.endpoints_[link_] = this;
}

SimEndpoint::~SimEndpoint() {
  World& world = network_.world;
  if (memories_ != 0) world.violate("an endpoint was destroyed before the peer's memory that it opened");
  if (!closed() && !transport_.over_) world.violate("an endpoint was destroyed before it was closed");
  for (const auto& put : puts_) put->ended = true;
  transport_.endpoints_.erase(link_);
}

void SimEndpoint::send(Bytes message) {
  if (closing_ || !failure_.ok() || transport_.dead_ || transport_.over_) return;
  Packet packet;
  packet.bytes = std::move(message);
  packet.departure = network_.world.now() + network_.delay() / 4;
  stream_->packets.push_back(std::move(packet));
  pump(network_, stream_);
}

void SimEndpoint::pump(Network& network, const std::shared_ptr<Stream>& stream) {
  if (stream->moving || stream->packets.empty()) return;
  stream->moving = true;
  const std::uint64_t departure = std::max(network.world.now(), stream->packets.front().departure);
  network.world.at(departure + network.delay(), [&network, stream] { deliver(network, stream); });
}

void SimEndpoint::deliver(Network& network, const std::shared_ptr<Stream>& stream) {
  const std::uint64_t until = network.cut_until(stream->from, stream->to);
  if (until > network.world.now()) {
    network.world.at(until + network.delay(), [&network, stream] { deliver(network, stream); });
    return;
  }
  stream->moving = false;
  if (stream->packets.empty()) return;
  if (network.chance(network.profile.bad_message)) spoil(network, *stream);
  if (!stream->packets.empty()) {
    Packet packet = std::move(stream->packets.front());
    stream->packets.pop_front();
    hand_over(network, *stream, std::move(packet));
  }
  pump(network, stream);
}

// What no transport should do: the receiver has to see it.
void SimEndpoint::spoil(Network& network, Stream& stream) {
  Random& random = network.world.random;
  auto& packets = stream.packets;
  if (packets.front().put != nullptr) return;
  if (network.on_damage) network.on_damage(stream.from, stream.to);
  switch (random.below(4)) {
    case 0:
      network.world.note("network: a message from {} to {} is lost", stream.from, stream.to);
      packets.pop_front();
      break;
    case 1:
      network.world.note("network: a message from {} to {} comes twice", stream.from, stream.to);
      packets.push_front(packets.front());
      break;
    case 2:
      if (packets.size() > 1 && packets[1].put == nullptr) {
        network.world.note("network: two messages from {} to {} change places", stream.from, stream.to);
        std::swap(packets[0], packets[1]);
      }
      break;
    default:
      network.world.note("network: a message from {} to {} has a bit flipped", stream.from, stream.to);
      packets.front().bytes[random.below(packets.front().bytes.size())] ^= 1 << random.below(8);
  }
}

void SimEndpoint::hand_over(Network& network, const Stream& stream, Packet packet) {
  SimTransport* transport = network.find(stream.to);
  if (packet.put != nullptr && !packet.put->ended) {
    const auto* source = packet.put->source + packet.offset;
    if (SimTransport* from = network.find(stream.from)) {
      if (!from->site_.space.holds(reinterpret_cast<std::uint64_t>(source), packet.size)) {
        network.world.violate("a put's source was freed before the put was done");
        return;
      }
      packet.bytes.assign(source, source + packet.size);
      if (--packet.put->parts == 0) from->endpoints_.at(stream.link)->end(packet.put, {});
    }
  }
  if (packet.put == nullptr && packet.bytes.size() > 7) {
    network.world.note("network: {} to {}, message type {} of {} bytes", stream.from, stream.to, packet.bytes[6],
                       packet.bytes.size());
  }
  if (transport == nullptr) return;
  transport->post(false, [&network, transport, link = stream.link, packet = std::move(packet)] {
    if (packet.put == nullptr) {
      transport->sink_->on_message(link, packet.bytes.data(), packet.bytes.size());
      return;
    }
    if (packet.bytes.empty()) return;
    void* to = transport->sink_->on_put(link, packet.slot, packet.offset, packet.bytes.size());
    if (to != nullptr) {
      if (!transport->site_.space.holds(reinterpret_cast<std::uint64_t>(to), packet.bytes.size())) {
        network.world.violate("a put was placed outside of this process's memory");
        return;
      }
      std::memcpy(to, packet.bytes.data(), packet.bytes.size());
    } else if (SimEndpoint* endpoint = transport->endpoint(link)) {
      endpoint->fail(Status::error(Code::kProtocol, "simulated: a put that may not be written"));
    }
  });
}

void SimEndpoint::put(const void* source, std::size_t bytes, const transport::PeerMemory& target, transport::Op* op) {
  const auto& memory = static_cast<const SimPeerMemory&>(target);
  op->done = false;
  auto put = std::make_shared<Put>();
  put->op = op;
  put->source = static_cast<const std::uint8_t*>(source);
  put->size = bytes;
  put->region = memory.region_;
  puts_.push_back(put);
  if (closing_ || !failure_.ok() || transport_.dead_ || transport_.over_) return end(put, lost("the link is over"));
  if (&memory.endpoint_ != this) network_.world.violate("a put into the memory of another link's peer");
  World& world = network_.world;
  const std::size_t parts = world.random.between(1, 3);
  put->parts = parts;
  const bool fails = network_.chance(network_.profile.bad_put);
  if (fails && network_.on_damage) network_.on_damage(transport_.site_.id, peer_);
  for (std::size_t i = 0; i < parts; ++i) {
    const std::size_t begin = bytes * i / parts;
    const std::size_t end = bytes * (i + 1) / parts;
    if (memory.rma_) {
      world.after(network_.delay(),
                  [this, &network = network_, put, begin, end, fails, from = transport_.site_.id, link = link_] {
                    if (put->ended) return;
                    SimTransport* alive = network.find(from);
                    if (alive != nullptr && fails) {
                      alive->endpoint(link)->end(put, Status::error(Code::kTransport, "simulated: a put failed"));
                    } else if (alive != nullptr) {
                      land(put, begin, end);
                    }
                  });
    } else {
      Packet packet;
      packet.put = put;
      packet.departure = world.now() + network_.delay() / 4;
      packet.slot = memory.slot_;
      packet.offset = begin;
      packet.size = end - begin;
      stream_->packets.push_back(std::move(packet));
    }
  }
  pump(network_, stream_);
}

// A part of a put by a device, without the peer's help.
void SimEndpoint::land(const std::shared_ptr<Put>& put, std::size_t begin, std::size_t end) {
  World& world = network_.world;
  const std::uint64_t until = network_.cut_until(transport_.site_.id, peer_);
  if (until > world.now()) {
    world.at(until + network_.delay(),
             [&network = network_, put, begin, end, from = transport_.site_.id, link = link_] {
               SimTransport* alive = network.find(from);
               if (!put->ended && alive != nullptr) alive->endpoint(link)->land(put, begin, end);
             });
    return;
  }
  if (!transport_.site_.space.holds(reinterpret_cast<std::uint64_t>(put->source) + begin, end - begin)) {
    world.violate("a put's source was freed before the put was done");
    return;
  }
  const Network::Region& region = network_.regions.at(put->region);
  if (region.registered) {
    network_.on_write(transport_.site_.id, reinterpret_cast<std::uint64_t>(region.bytes->data()));
    std::memcpy(region.bytes->data() + begin, put->source + begin, end - begin);
  } else {
    put->status = lost("simulated: the peer's memory is not registered any more");
  }
  if (--put->parts == 0) this->end(put, put->status);
}

void SimEndpoint::end(std::shared_ptr<Put> put, Status status) {
  if (put->ended) return;
  put->ended = true;
  puts_.remove(put);
  if (transport_.dead_ || transport_.over_) {
    put->op->done = true;
    put->op->status = std::move(status);
    return;
  }
  transport_.post(true, [put, status = std::move(status)] {
    put->op->done = true;
    put->op->status = status;
  });
}

Status SimEndpoint::share(const transport::Memory& memory, wire::SlotGrant* grant) {
  if (network_.chance(network_.profile.no_memory)) {
    if (network_.on_damage) network_.on_damage(transport_.site_.id, peer_);
    return Status::error(Code::kTransport, "simulated: a registration failed");
  }
  const std::uint64_t region = static_cast<const SimMemory&>(memory).region();
  const std::uint64_t before = std::exchange(network_.regions.at(region).link, link_);
  if (network_.profile.isolate && before != 0 && before != link_) {
    network_.world.violate("a link is given the memory that another one has had");
  }
  grant->rkey.resize(sizeof region);
  std::memcpy(grant->rkey.data(), &region, sizeof region);
  return {};
}

Status SimEndpoint::open(const wire::SlotGrant& grant, bool map, std::unique_ptr<transport::PeerMemory>* out) {
  std::uint64_t region = 0;
  if (grant.rkey.size() != sizeof region) return Status::error(Code::kProtocol, "simulated: the key is malformed");
  std::memcpy(&region, grant.rkey.data(), sizeof region);
  const auto found = network_.regions.find(region);
  if (found == network_.regions.end() || !found->second.registered || found->second.bytes->size() < grant.bytes) {
    return Status::error(Code::kTransport, "simulated: the key opens nothing");
  }
  *out = std::make_unique<SimPeerMemory>(*this, wire::SlotName{grant.slot, grant.generation}, region,
                                         network_.reach(transport_.site_.id, peer_), map);
  return {};
}

bool SimEndpoint::drained() {
  const auto& packets = stream_->packets;
  return transport_.dead_ || packets.empty() || packets.back().departure <= network_.world.now();
}

void SimEndpoint::close() {
  if (closing_) return;
  closing_ = true;
  auto& packets = stream_->packets;
  while (!packets.empty() && (packets.back().departure > network_.world.now() || packets.back().put != nullptr)) {
    packets.pop_back();
  }
  if (transport_.dead_) return;
  network_.world.after(network_.world.random.below(kMostClose) + 1,
                       [&network = network_, from = transport_.site_.id, link = link_] {
                         SimTransport* alive = network.find(from);
                         SimEndpoint* self = alive != nullptr ? alive->endpoint(link) : nullptr;
                         if (self == nullptr) return;
                         while (!self->puts_.empty()) self->end(self->puts_.front(), lost("the link was closed"));
                         alive->post(true, [alive, link] {
                           if (SimEndpoint* at = alive->endpoint(link)) at->closed_ = true;
                         });
                       });
}

bool SimEndpoint::closed() const {
  return closed_ || (closing_ && transport_.dead_);
}

void SimEndpoint::fail(Status status) {
  if (!failure_.ok() || closing_) return;
  failure_ = std::move(status);
  network_.world.note("network: the endpoint of {} to {} fails", transport_.site_.id, peer_);
  while (!puts_.empty()) end(puts_.front(), failure_);
  transport_.site_.wake();
}

}  // namespace hetkv::sim
