// A simulated network and the memory that goes through it: one transport for each process, with the interface that
// engines use. Messages of a link keep their order; those of different links do not wait for each other. Puts land in
// parts, some of them after their sender is gone.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "profile.h"
#include "transport/transport.h"
#include "world.h"

namespace hetkv::sim {

using Bytes = std::vector<std::uint8_t>;

// What a process has mapped.
class AddressSpace {
 public:
  void map(std::uint64_t address, std::size_t bytes) { ranges_.emplace(address, bytes); }
  void unmap(std::uint64_t address, std::size_t bytes);
  bool holds(std::uint64_t address, std::size_t bytes) const;

 private:
  std::multimap<std::uint64_t, std::size_t> ranges_;
};

// A process as network and mover see it.
struct Site {
  std::uint64_t id = 0;
  AddressSpace space;
  bool alive = true;
  bool paused = false;
  std::function<void()> wake;  // its engine has something to do
};

class SimTransport;

class Network {
 public:
  Network(World& its_world, const Profile& its_profile)
      : world(its_world), profile(its_profile), salt_(its_world.random.next()) {}

  World& world;
  const Profile& profile;
  bool faults = true;  // none from now on where false

  bool chance(double probability) { return faults && probability > 0 && world.random.chance(probability); }
  std::uint64_t delay() { return world.random.delay(profile.most_delay); }

  Reach reach(std::uint64_t sender, std::uint64_t receiver) const;
  // Nothing passes between the two processes until then.
  void cut(std::uint64_t a, std::uint64_t b, std::uint64_t until);
  std::uint64_t cut_until(std::uint64_t a, std::uint64_t b) const;
  void heal() { cuts_.clear(); }

  // Null where it has ended.
  SimTransport* find(std::uint64_t process) const;

  struct Region {
    std::shared_ptr<Bytes> bytes;
    bool registered = true;
    std::uint64_t link = 0;  // that was given it; the last one, where several are
  };
  std::unordered_map<std::uint64_t, Region> regions;
  std::uint64_t next_region = 1;
  // A process writes there, and it is another process's memory where that has granted it a slot.
  std::function<void(std::uint64_t writer, std::uint64_t address)> on_write;
  // Requests whose payload was damaged are reported by this alone.
  std::function<void(std::uint64_t sender, std::uint64_t receiver)> on_damage;

 private:
  friend class SimTransport;
  const std::uint64_t salt_;
  std::map<std::uint64_t, SimTransport*> transports_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint64_t> cuts_;
};

struct Put {
  transport::Op* op = nullptr;
  const std::uint8_t* source = nullptr;
  std::size_t size = 0;
  std::uint64_t region = 0;
  std::size_t parts = 0;
  Status status;
  bool ended = false;
};

class SimEndpoint final : public transport::Endpoint {
 public:
  SimEndpoint(Network& network, SimTransport& transport, const transport::PeerAddress& peer);
  ~SimEndpoint() override;

  void send(Bytes message) override;
  void put(const void* source, std::size_t bytes, const transport::PeerMemory& target, transport::Op* op) override;
  Status share(const transport::Memory& memory, wire::SlotGrant* grant) override;
  Status open(const wire::SlotGrant& grant, bool map, std::unique_ptr<transport::PeerMemory>* out) override;
  bool drained() override;
  void close() override;
  bool closed() const override;
  const Status& failure() const override { return failure_; }

  void fail(Status status);
  std::uint64_t peer() const { return peer_; }
  bool quiet() const { return stream_->packets.empty() && puts_.empty(); }

 private:
  friend class SimTransport;
  friend class SimPeerMemory;
  struct Packet {
    Bytes bytes;
    std::uint64_t departure = 0;
    std::shared_ptr<Put> put;  // of which this is a piece
    wire::SlotName slot{};
    std::uint64_t offset = 0;
    std::size_t size = 0;
  };
  struct Stream {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    std::uint64_t link = 0;
    std::deque<Packet> packets;
    bool moving = false;
  };
  static void pump(Network& network, const std::shared_ptr<Stream>& stream);
  static void deliver(Network& network, const std::shared_ptr<Stream>& stream);
  static void hand_over(Network& network, const Stream& stream, Packet packet);
  static void spoil(Network& network, Stream& stream);
  void land(const std::shared_ptr<Put>& put, std::size_t begin, std::size_t end);
  void end(std::shared_ptr<Put> put, Status status);  // by value: the list that has it lets it go

  Network& network_;
  SimTransport& transport_;
  const std::uint64_t peer_;
  const std::uint64_t link_;
  std::shared_ptr<Stream> stream_;
  std::list<std::shared_ptr<Put>> puts_;
  Status failure_;
  bool closing_ = false;
  bool closed_ = false;
  int memories_ = 0;
};

class SimPeerMemory final : public transport::PeerMemory {
 public:
  SimPeerMemory(SimEndpoint& endpoint, wire::SlotName slot, std::uint64_t region, Reach reach, bool map);
  ~SimPeerMemory() override;

 private:
  friend class SimEndpoint;
  SimEndpoint& endpoint_;
  const wire::SlotName slot_;
  const std::uint64_t region_;
  std::shared_ptr<Bytes> bytes_;  // a mapping keeps the memory
};

class SimMemory final : public transport::Memory {
 public:
  SimMemory(Network& network, Site& site, std::size_t bytes);
  ~SimMemory() override;
  std::uint64_t region() const { return region_; }

 private:
  Network& network_;
  Site& site_;
  const std::uint64_t region_;
};

class SimTransport final : public transport::Transport {
 public:
  SimTransport(Network& network, Site& site);
  ~SimTransport() override;

  Status start(transport::Sink* sink) override;
  void close() override;
  const Bytes& address() const override { return address_; }
  Status connect(const transport::PeerAddress& peer, std::unique_ptr<transport::Endpoint>* out) override;
  bool progress() override;
  bool arm() override { return true; }
  int event_fd() const override { return -1; }
  Status allocate(std::size_t bytes, std::unique_ptr<transport::Memory>* out) override;
  bool reaches(transport::MemoryKind) const override { return false; }
  Status attach(std::uint64_t, std::size_t, transport::MemoryKind, std::unique_ptr<transport::Memory>*) override {
    return Status::error(Code::kUnsupported, "simulated: no devices");
  }

  // The process dies: what it sent is on its way, what it waits for will not come.
  void die();
  // While its engine stops and waits, the world goes on.
  void go_on() { goes_on_ = true; }
  SimEndpoint* endpoint(std::uint64_t link) const;
  const std::map<std::uint64_t, SimEndpoint*>& endpoints() const { return endpoints_; }  // by link
  bool quiet() const { return inbox_.empty(); }

 private:
  friend class SimEndpoint;
  friend class SimPeerMemory;
  struct Item {
    bool ends = false;  // an operation, which close() still lets end
    std::function<void()> action;
  };
  void end_operations();
  void post(bool ends, std::function<void()> action);

  Network& network_;
  Site& site_;
  transport::Sink* sink_ = nullptr;
  Bytes address_;
  std::deque<Item> inbox_;
  std::map<std::uint64_t, SimEndpoint*> endpoints_;
  bool dead_ = false;
  bool over_ = false;
  bool goes_on_ = false;
};

}  // namespace hetkv::sim
