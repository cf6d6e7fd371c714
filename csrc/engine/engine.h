// What sender and receiver share: a progress thread that owns a transport and all links. Public calls may come from any
// thread; they post work to the progress thread and return. The thread spins while there is work and sleeps at rest.
// Time, transport and mover are given, so that a simulation can run the same engine turn by turn.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "clock.h"
#include "engine/config.h"
#include "engine/events.h"
#include "engine/link.h"
#include "engine/mover.h"
#include "engine/outcome.h"

namespace hetkv::engine {

struct EngineStats {
  std::atomic<std::uint64_t> frames{0};
  std::atomic<std::uint64_t> bundles{0};  // that frames shared, or were alone in
  std::atomic<std::uint64_t> payload_bytes{0};
  std::atomic<std::uint64_t> saturated{0};
  std::atomic<std::uint64_t> direct_frames{0};  // stored straight into the peer's window,
  std::atomic<std::uint64_t> device_frames{0};  // of these into the memory of a device
  std::atomic<std::uint64_t> stale_frames{0};   // of requests that had ended
  std::atomic<std::uint64_t> failed_requests{0};
  std::atomic<std::uint64_t> quarantined_slots{0};
  std::atomic<std::uint64_t> wakeups{0};
  std::atomic<std::uint64_t> pending_tickets{0};  // sender: tickets that wait for their request now
  std::atomic<std::uint64_t> granted_slots{0};  // receiver: granted to senders or being unpacked; sender: granted to it
};

// What an engine is made of.
struct Parts {
  std::unique_ptr<transport::Transport> transport;
  std::unique_ptr<Mover> mover;
  std::shared_ptr<const Clock> clock;
  std::shared_ptr<Device> device;  // the pool's; null where it is in host memory
};

class Engine : private transport::Sink {
 public:
  Engine(const EngineConfig& config, Parts parts);
  virtual ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Starts the transport and the progress thread. Call once. Without `threaded` there is no such thread: all calls come
  // from one thread of the caller's, which also calls `turn`.
  virtual Status start(bool threaded = true);
  // One turn of the progress thread: takes what was posted and what has come, and goes on with it. False: nothing
  // moved, and nothing will before a message comes, a task of the mover's ends, or `next_ns`.
  bool turn();
  // When the next deadline, heartbeat or timeout is due.
  std::uint64_t next_ns(std::uint64_t now) const;
  // Ends all links, fails all requests with kClosed, joins the thread and ends the transport. Derived destructors call
  // it first. Idempotent.
  void stop();
  // False in a forked child of the process that made the engine. It has no progress thread, so that it must
  // leave the engine as it is, undestroyed.
  bool made_here() const;

  const std::vector<std::uint8_t>& address() const { return address_; }  // of the transport
  const EngineConfig& config() const { return config_; }
  const Device* device() const { return device_.get(); }
  EngineStats& stats() { return stats_; }
  EventQueue& events() { return events_; }
  Outcomes& outcomes() { return outcomes_; }
  Trace& trace() { return trace_; }

  // Blocks until the endpoint exists. From then on messages of the link are taken. kInvalid where a plan cannot be
  // served.
  Status add_link(LinkConfig config, std::uint32_t* id);
  // The peer has added its side of the link: messages may be sent. Where the link was lost before, kLinkLost and
  // kLinkDrained come again, as the caller that added it may not have known it the first time.
  void activate_link(std::uint32_t id);
  // The link is over (`status` says why): the peer gets a bye where it can; kLinkLost and, once nothing is in flight,
  // kLinkDrained follow. Idempotent.
  void drop_link(std::uint32_t id, Status status);
  // For tests of what a peer does with them: sends `bytes` as they are; they take one sequence number.
  void inject(std::uint32_t id, std::vector<std::uint8_t> bytes);
  // For tests: the sequence number that the next message on the link will have.
  std::uint64_t next_sequence(std::uint32_t id);

 protected:
  // All below run on the progress thread.
  virtual void on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) = 0;
  // Where a put of this link's goes; null where it may not.
  virtual void* place(Link& link, wire::SlotName slot, std::uint64_t offset, std::uint64_t bytes) = 0;
  virtual bool step(std::uint64_t now) = 0;    // true: something moved
  virtual bool busy() const = 0;               // work of this side is in flight
  virtual bool watching() const = 0;           // some of it is a device's, which wakes nobody when it ends
  virtual bool expecting() const = 0;          // the peer's next message lets work go on: spin before sleeping
  virtual std::uint64_t deadline() const = 0;  // the next time at which step() has something to do; 0: none
  virtual void on_link_up(Link& link) = 0;
  virtual void on_link_lost(Link& link, const Status& status) = 0;
  virtual bool link_drained(const Link& link) const = 0;    // no kernel of this side stores into the peer's memory
  virtual bool link_idle(const Link& link) const = 0;       // nothing of this side refers to an operation of the link
  virtual void on_link_closed(Link& link) = 0;              // all operations of the link have ended; it goes away now
  virtual void on_stop(const Status& status) = 0;           // fails all requests
  virtual void on_ended() = 0;                              // all has drained: gives memory back
  virtual void on_arrived(const Outcome&, std::int32_t) {}  // a layer, or with -1 the request's end; streams may wait

  // Tell the request's callers, and those who watch.
  void tell_layer(Outcome& outcome, std::uint32_t layer);
  void tell_packed(Outcome& outcome);
  void tell_end(Outcome& outcome, Status failure = {});

  bool post(std::function<void()> command);  // false: the engine is closed, the command is dropped
  void call(std::function<void()> command);  // post and wait
  // Never destroys the link nor a request, so that callers may go on using both.
  void lose(Link& link, const Status& status, bool tell = true);
  std::shared_ptr<Link> link(std::uint32_t id) const;
  template <typename Body>
  void send(Link& link, wire::Prelude prelude, const Body& body) {
    std::vector<std::uint8_t> message;
    prelude.sequence = link.send_sequence++;
    wire::encode(prelude, body, link.config.send_key, message);
    transmit(link, std::move(message));
  }
  void send(Link& link, wire::Prelude prelude);

  std::uint64_t now_ns() const { return clock_->now_ns(); }

  const EngineConfig config_;
  const std::shared_ptr<const Clock> clock_;
  const std::shared_ptr<Device> device_;
  std::unique_ptr<transport::Transport> transport_;
  std::unique_ptr<Mover> mover_;
  EngineStats stats_;
  EventQueue events_;
  Outcomes outcomes_;
  Trace trace_;
  std::map<std::uint32_t, std::shared_ptr<Link>> links_;

 private:
  friend struct Inspect;                     // of tests/sim
  static constexpr int kProgressBurst = 64;  // calls of the transport's progress in a row

  struct Incoming {
    std::uint64_t link;
    std::vector<std::uint8_t> bytes;
  };
  void on_message(std::uint64_t link, const std::uint8_t* data, std::size_t size) override;
  void* on_put(std::uint64_t link, wire::SlotName slot, std::uint64_t offset, std::uint64_t bytes) override;
  void run() noexcept;
  void loop();
  void end(const Status& status) noexcept;
  bool drain_commands();
  bool drain_messages();
  void receive(const Incoming& message);
  bool check_links(std::uint64_t now, bool due = false);
  void sleep(std::uint64_t now);
  bool may_close(const Link& link, std::uint64_t now) const;
  void close_all(const Status& status);
  void transmit(Link& link, std::vector<std::uint8_t> message);
  void wake();

  const int process_;
  std::vector<std::uint8_t> address_;
  std::thread thread_;
  std::mutex mutex_;  // of commands_ and accepting_
  std::vector<std::function<void()>> commands_;
  std::atomic<bool> posted_{false};  // there are some
  bool accepting_ = false;
  std::atomic<bool> sleeping_{false};
  bool started_ = false;
  bool threaded_ = true;
  bool stopping_ = false;
  int wake_fd_ = -1;
  int poll_fd_ = -1;
  std::vector<Incoming> incoming_;
  std::map<std::uint64_t, Link*> numbers_;  // links by their number
  std::uint32_t next_link_ = 1;
  std::size_t draining_ = 0;      // links that are closing
  std::uint64_t checked_ns_ = 0;  // when all links were looked at
};

}  // namespace hetkv::engine
