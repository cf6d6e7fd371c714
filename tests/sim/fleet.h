// Processes with the real engines, and the control connections between them, as hetkv/transport/node.py handles these.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cache.h"
#include "engine/receiver.h"
#include "engine/sender.h"
#include "mover.h"
#include "network.h"
#include "profile.h"
#include "world.h"

namespace hetkv::sim {

class SimClock final : public Clock {
 public:
  SimClock(const World& world, std::uint64_t wall) : world_(world), wall_(wall) {}
  std::uint64_t now_ns() const override { return kSecond + world_.now() + ahead; }
  std::uint64_t wall_ns() const override { return wall_ + world_.now(); }
  std::uint64_t ahead = 0;

 private:
  const World& world_;
  const std::uint64_t wall_;
};

// One process: an engine over a pool. Stays until the seed is over, also where it has died.
struct Process {
  Site site;
  bool sends = false;
  std::uint32_t instance = 0;
  std::uint32_t rank = 0;
  std::shared_ptr<SimClock> clock;
  std::unique_ptr<Cache> cache;
  std::unique_ptr<engine::Sender> sender;
  std::unique_ptr<engine::Receiver> receiver;
  SimTransport* transport = nullptr;
  SimMover* mover = nullptr;
  std::vector<std::function<void()>> waiting;  // what its program does once it goes on
  std::uint64_t due = ~std::uint64_t{0};       // of its next turn
  std::uint64_t disturbed_until = 0;           // something befell it that excuses failures; 0: nothing yet
  std::uint64_t paused_at = 0;

  engine::Engine* engine() const {
    return sends ? static_cast<engine::Engine*>(sender.get()) : static_cast<engine::Engine*>(receiver.get());
  }
};

// One control connection and its link. Side 0 is the sender's, side 1 the receiver's.
struct Control {
  Process* side[2] = {};
  std::uint64_t number = 0;
  std::uint32_t id[2] = {};
  bool added[2] = {};
  bool ready[2] = {};  // the peer has added it
  bool active[2] = {};
  bool lost[2] = {};    // the engine says so
  bool closed[2] = {};  // the connection
  bool forged = false;  // one side did not keep the rules: what it believes of its slots is wrong
  std::uint64_t disturbed_until = 0;

  bool usable(int at) const { return active[at] && !lost[at] && !closed[at]; }
};

class Fleet {
 public:
  Fleet(World& world, const Profile& profile);
  ~Fleet();

  // Gets each event of an engine except those of links, and after each turn.
  std::function<void(Process&, const engine::Event&)> on_event;
  std::function<void(Process&)> on_turn;
  // A part of a pack or unpack of the process has run.
  std::function<void(Process&)> on_moved;
  std::function<void(Process&, bool orderly)> on_death;

  World& world;
  Network network;
  Model model;
  engine::EngineConfig config;

  std::uint32_t instances(bool sends) const { return sends ? send_instances_ : receive_instances_; }
  std::uint32_t ranks(bool sends) const { return sends ? send_ranks_ : receive_ranks_; }
  // The one that has that name now; it may be dead.
  Process& current(bool sends, std::uint32_t instance, std::uint32_t rank) const;
  const std::vector<Process*>& currents() const { return current_; }
  // The usable link between two processes, as `at` sees it; null where there is none.
  const Control* link(const Process& sender, const Process& receiver, int at) const;
  const std::vector<std::unique_ptr<Control>>& controls() const { return controls_; }
  // As a side of the link uses them.
  engine::LinkConfig link_config(const Control& control, int at) const;
  static bool share_heads(const Process& a, const Process& b);

  void start_all();
  // Runs in the process when it can: now, once it goes on, or never.
  void perform(Process& process, std::function<void()> action);
  void wake(Process& process);
  // Something befalls a process or a link: requests of it may fail for that.
  void disturb(Process& process, std::uint64_t duration = 0);
  void disturb(Control& control) { control.disturbed_until = std::max<std::uint64_t>(world.now(), 1); }
  // Whether it did so since then, or so shortly before that links had not come again.
  bool disturbed(const Process& process, std::uint64_t since) const;
  bool disturbed(const Process& sender, const Process& receiver, std::uint64_t since) const;

  void kill(Process& process);
  void close(Process& process);
  void pause(Process& process, std::uint64_t duration);
  void jump(Process& process, std::uint64_t by);

  std::uint64_t recovery() const { return recovery_; }  // in which links come again

 private:
  Process& start(bool sends, std::uint32_t instance, std::uint32_t rank);
  void restart(const Process& dead);
  void turn(Process& process);
  void schedule(Process& process, std::uint64_t time);
  void drain_events(Process& process);
  void bury(Process& process);
  void expect_lost(Process& process);
  void check_write(std::uint64_t writer, std::uint64_t address);
  void spoil(const Process& receiver, std::uint64_t writer, std::uint32_t user);

  void connect(Process& sender, Process& receiver);
  void connect_all(Process& process);
  void add_link(Control& control, int at);
  void activate(Control& control, int at);
  void close_side(Control& control, int at);
  void connection_lost(Control& control, int at);
  void connect_again(const Control& control);
  void on_link_event(Process& process, const engine::Event& event);

  const Profile& profile_;
  std::uint32_t send_instances_, receive_instances_, send_ranks_, receive_ranks_;
  std::uint64_t next_process_ = 1;
  std::uint64_t next_link_ = 1;
  std::uint64_t recovery_;
  std::uint64_t secret_;
  std::vector<std::unique_ptr<Process>> processes_;
  std::vector<Process*> current_;
  std::vector<std::unique_ptr<Control>> controls_;
};

}  // namespace hetkv::sim
