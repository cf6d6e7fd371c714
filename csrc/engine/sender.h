// The prefill side: takes layers as they are computed, waits for tickets, packs what is ready into bundles and gets
// these into windows.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/lanes.h"
#include "engine/mover.h"
#include "engine/waiting_links.h"
#include "engine/windows.h"

namespace hetkv::engine {

// What the sender holds of one request. `tokens` and `blocks` are per cache group.
struct Submission {
  wire::RequestId id{};
  std::vector<wire::TokenRange> tokens;           // what may be asked for: from the first token whose block ids count
                                                  // to all that the request will have when it is computed
  std::vector<std::vector<std::int32_t>> blocks;  // block ids in token order; may grow by `extend`
  std::uint64_t hold_ms = 0;             // blocks are held this long for tickets and their completion; 0: no limit
  std::optional<wire::Content> content;  // a ticket for another one is rejected, and ends the request
  std::int32_t priority = 0;             // on each link those of a lower number go before all others
};

// What one step of the caller's computes of several requests: for each its tokens per cache group, the same in every
// layer.
struct SendBatch {
  std::vector<std::uint64_t> handles;
  std::vector<std::vector<wire::TokenRange>> tokens;  // per cache group: one range a handle; an empty one is skipped
};

class Sender final : public Engine {
 public:
  Sender(const EngineConfig& config, Parts parts) : Engine(config, std::move(parts)) {}
  ~Sender() override;

  // All return at once. A handle is never reused; calls with a handle that has ended do nothing.
  // kInvalid: a request with this id is under way; kClosed: the engine has ended.
  Status submit(Submission submission, std::shared_ptr<Outcome>* out);
  void extend(std::uint64_t handle, std::size_t group, std::vector<std::int32_t> blocks);
  static constexpr std::int32_t kAllLayers = -1;
  // The batch's tokens of a global layer, or of all of the pool's, are in the pool and stay there unchanged until
  // kPacked or kFailed. Blocks for them were submitted before. One hand-over to the progress thread, whatever the
  // number of requests and layers.
  void send_batch(std::shared_ptr<const SendBatch> batch, std::int32_t layer);
  void send_layer(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens);
  // The same, of a pool on a device: they will be in the pool once what `stream` holds now has ended. Does not wait.
  // kInvalid: a stream of another device, or one that captures a graph; nothing is sent then.
  Status send_batch(std::shared_ptr<const SendBatch> batch, std::int32_t layer, void* stream);
  Status send_layer(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens, void* stream);
  // How payloads get to the peer of a link, by its latest window.
  Path path(std::uint32_t link);
  void abort(std::uint64_t handle, std::string reason);
  // The id will not be sent again: tickets for it that wait or come are rejected with `reason` instead of waiting,
  // until it is submitted after all. Nothing happens where it is under way. Remembered for 10 minutes, of the last
  // 4,096 ids.
  void reject(wire::RequestId id, std::string reason);

 private:
  friend struct Inspect;  // of tests/sim
  using Request = SendRequest;
  struct Window {
    std::unique_ptr<PeerWindow> memory;
    std::uint32_t generation = 0;
    bool granted = false;
  };
  struct LinkWindows {
    std::map<std::uint32_t, Window> slots;
    std::vector<std::uint32_t> free;  // granted and unused
    LaneQueue ready;                  // lanes whose next layer is computed,
    LaneQueue ahead;                  // and lanes whose next layer a pack may wait for in a stream
    std::size_t open = 0;             // lanes that have something left to pack
    std::size_t tickets = 0;          // that wait for their request
    std::size_t in_flight = 0;        // bundles, without those that wait for the caller's work
    bool turn = false;                // of the queues' two orders
    bool awake = false;               // in `awake_`
    bool released = false;            // the receiver may take this side for sated: say so before the next frame
    bool recalled = false;            // others need the slots: none is kept idle
    bool host_only = false;           // the receiver knows that its device's memory cannot be reached
    std::size_t staged = 0;           // bundles with a staging buffer
  };
  // One frame of a bundle.
  struct Piece {
    Lane* lane = nullptr;
    const LayerPlan* plan = nullptr;
    wire::Record record;
  };
  struct Work {
    std::size_t bytes = 0;
    std::size_t frames = 0;
  };
  // What shares a slot, a launch, a copy or put, and a commit.
  struct Bundle {
    std::shared_ptr<Link> link;
    std::vector<Piece> pieces;  // those of a lane are adjacent
    std::uint64_t bytes = 0;    // up to the end of the last payload
    RemapTask task;
    std::uint32_t slot = 0;
    std::unique_ptr<OwnWindow> staging;  // null: packed straight into the window
    bool direct = true;                  // gets into the window by this side's own stores or copies
    bool ahead = false;                  // launched before the caller's work had ended
    transport::Op put;
    std::uint64_t put_ns = 0;  // when it began
    bool slow = false;         // it takes long: its buffer counts for nothing
    std::list<std::unique_ptr<Bundle>>::iterator self;

    void clear() {  // as new, but for the memory of its vectors
      pieces.clear();
      task.clear();
      link.reset();
      bytes = 0;
      direct = true;
      ahead = false;
      put = {};
      put_ns = 0;
      slow = false;
    }
  };
  struct PendingTicket {
    std::shared_ptr<Link> link;
    std::uint64_t epoch;
    std::vector<wire::TokenRange> want;
    std::uint64_t deadline_ns;
    std::optional<wire::Content> content;
  };

  // A request that failed. A peer whose ticket was under way then learns of it once; its next ticket is a new attempt,
  // unless the id is never sent again.
  struct Ended {
    static constexpr std::uint64_t kFinalNs = 600'000'000'000;  // for how long a final one is remembered

    std::uint64_t at_ns;
    Status why;
    std::vector<std::string> informed;  // peers that know
    bool final = false;                 // by `reject`: all are informed, always
  };

  void on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) override;
  void* place(Link&, wire::SlotName, std::uint64_t, std::uint64_t) override { return nullptr; }
  bool step(std::uint64_t now) override;
  bool busy() const override { return !bundles_.empty(); }
  bool watching() const override { return device_ != nullptr && (busy() || !waves_.empty()); }
  bool expecting() const override { return !requests_.empty(); }
  std::uint64_t deadline() const override;
  void on_link_up(Link& link) override;
  void on_link_lost(Link& link, const Status& status) override;
  bool link_drained(const Link& link) const override;
  bool link_idle(const Link& link) const override;
  void on_link_closed(Link& link) override;
  void on_stop(const Status& status) override;
  void on_ended() override;

  // sender_messages.cpp
  void on_ticket(Link& link, const wire::Prelude& prelude, wire::Ticket ticket);
  void on_grant(Link& link, const wire::Grant& grant);
  void on_done(Link& link, const wire::Prelude& prelude, const wire::Done& done);
  void on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort);
  using Pending = std::multimap<wire::RequestId, PendingTicket>;
  void take_ticket(const wire::RequestId& id, PendingTicket ticket);
  Pending::iterator drop_ticket(Pending::iterator at);
  Status check_state(const Request& request, const PendingTicket& ticket) const;
  Status check_match(const Request& request, const PendingTicket& ticket) const;
  void add_lane(Request& request, PendingTicket ticket);
  void send_back(Link& link, const wire::Release& slots);
  void release(Link& link);
  void release_idle(Link& link);

  // sender_endings.cpp
  void cancel(Lane& lane);
  void fail(Request& request, Status status, const Link* reporter = nullptr);
  void reject(Link& link, const wire::RequestId& id, std::uint64_t epoch, Status why);
  void conclude(Request& request);  // may erase it
  void remember(const wire::RequestId& id, Ended ended);
  void erase(Request& request);
  bool sweep(std::uint64_t now);
  void sweep_tickets(std::uint64_t now);
  Request* find(const wire::RequestId& id);

  // sender.cpp: what is ready
  Status record(void* stream, After* out);
  std::shared_ptr<Wave> make_wave(const After& after, const void* stream, std::vector<std::uint64_t> requests);
  void add_batch(const SendBatch& batch, std::int32_t layer, const std::shared_ptr<Wave>& wave);
  void add_ready(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens, const std::shared_ptr<Wave>& wave);
  bool watch_waves();
  void place(Lane& lane);
  void unplace(Lane& lane);
  void place_all(const Wave& wave);
  void awaken(const Link& link);
  bool feed_links();

  // sender_bundles.cpp: from lanes to commits
  bool feed(Link& link);
  bool start_bundle(Link& link, WaitingLinks** waits);
  std::size_t most_frames(const Link& link) const;
  Work ready_work(const LaneQueue& lanes, std::size_t most_bytes, std::size_t most_frames) const;
  bool take_staging(Link& link, Where window, Bundle* bundle, WaitingLinks** waits);
  bool take_turn(const Link& link, WaitingLinks& queue, std::size_t available, WaitingLinks** waits);
  void leave(std::uint32_t link, const WaitingLinks* but);
  void awaken(const WaitingLinks& queue, std::size_t available);
  std::size_t available(Where where) const;  // staging buffers
  std::size_t room_ahead() const;            // bundles that may wait in a stream, too
  void fill(LaneQueue& lanes, std::size_t room, bool shortest, Bundle* bundle);
  bool cut(Lane& lane, wire::TokenRange tokens, std::size_t room, Bundle* bundle);
  void launch(LinkWindows& windows, std::unique_ptr<Bundle> bundle);
  void on_packed(Bundle& bundle);
  bool advance_puts();
  void give_back(Bundle& bundle);
  void notice_slow_puts(std::uint64_t now);
  void end(Bundle& bundle);
  void commit(Bundle& bundle);
  void send_commit(Link& link, wire::Bundle body);

  std::uint64_t next_arrival_ = 0;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::unordered_map<wire::RequestId, std::uint64_t, IdHash> handles_;
  Pending pending_;
  std::map<wire::RequestId, Ended> ended_;
  std::deque<std::pair<std::uint64_t, wire::RequestId>> ended_order_;  // (at_ns, id), oldest first
  std::list<std::unique_ptr<Bundle>> bundles_;
  std::vector<std::unique_ptr<Bundle>> unused_;
  std::vector<Bundle*> putting_;                                    // packed, and being put
  std::vector<RemapTask*> packed_;                                  // of one turn
  std::map<std::uint32_t, LinkWindows> windows_;                    // per link
  std::deque<std::uint32_t> awake_;                                 // links that may have something to start
  WaitingLinks short_of_staging_[2];                                // links that wait for a buffer, by `Where`,
  WaitingLinks for_ahead_;                                          // or for one of the bundles ahead
  std::map<const void*, std::deque<std::shared_ptr<Wave>>> waves_;  // not computed yet, by stream, in its order
  std::vector<std::unique_ptr<OwnWindow>> staging_[2];              // unused, by `Where`
  int staging_made_[2] = {0, 0};                                    // without those of slow puts
  int ahead_ = 0;                                                // bundles that wait in a stream for the caller's work
  std::set<std::pair<std::uint64_t, std::uint64_t>> deadlines_;  // (deadline_ns, handle)
  std::uint64_t pending_deadline_ns_ = 0;                        // no pending ticket ends before it
  std::vector<std::uint64_t> failed_;                            // handles that end once nothing is in flight
};

}  // namespace hetkv::engine
