// The prefill side: takes layers as they are computed, waits for tickets, packs frames and puts them into windows.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/mover.h"
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
};

class Sender final : public Engine {
 public:
  Sender(const EngineConfig& config, std::unique_ptr<Mover> mover, std::shared_ptr<Device> device = nullptr);
  ~Sender() override;

  // All return at once. A handle is never reused; calls with a handle that has ended do nothing.
  std::uint64_t submit(Submission submission);
  void extend(std::uint64_t handle, std::size_t group, std::vector<std::int32_t> blocks);
  // Tokens [start, stop) of a global layer are in the pool and stay there unchanged until kPacked or kFailed. Blocks
  // for them were submitted before.
  void send_layer(std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop) {
    post_layer(handle, {layer, start, stop, nullptr});
  }
  // The same, of a pool on a device: they will be in the pool once what `stream` holds now has ended. Does not wait.
  // kInvalid: a stream of another device, or one that captures a graph; the layer is not sent then.
  Status send_layer(std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop, void* stream);
  // How payloads get to the peer of a link, by its latest window.
  Path path(std::uint32_t link);
  void abort(std::uint64_t handle, std::string reason);
  // The id will not be sent again: tickets for it that wait or come are rejected with `reason` instead of waiting,
  // until it is submitted after all. Nothing happens where it is under way. Remembered for 10 minutes, of the last
  // 4,096 ids.
  void reject(wire::RequestId id, std::string reason);

 private:
  struct Ready {
    std::uint32_t layer;
    std::uint64_t start;
    std::uint64_t stop;
    After after;
  };
  // One ticket on one link. `remaining` counts tokens over all plans that are not packed yet.
  struct Request;
  struct Lane {
    Request* request = nullptr;
    std::shared_ptr<Link> link;
    std::uint64_t epoch = 0;
    std::vector<wire::TokenRange> want;
    std::uint64_t remaining = 0;
    std::size_t ready = 0;    // cursor: next ready item,
    std::size_t plan = 0;     // plan of the link,
    std::uint64_t token = 0;  // and token inside it
    std::uint32_t in_flight = 0;
    std::uint64_t frames = 0;  // committed
    std::uint64_t bytes = 0;
    bool queued = false;     // in its link's queue
    bool delivered = false;  // the receiver said so
    bool cancelled = false;  // counts for nothing any more; goes with its request
  };
  struct Request {
    std::uint64_t handle = 0;
    wire::RequestId id{};
    std::vector<wire::TokenRange> tokens;
    std::vector<BlockTable> blocks;
    std::optional<wire::Content> content;
    std::vector<Ready> ready;
    std::map<std::uint32_t, std::vector<wire::TokenRange>> sent;  // the same by layer, merged
    std::list<Lane> lanes;
    std::uint64_t deadline_ns = 0;
    std::uint32_t packing = 0;  // packs in flight
    bool packed = false;
    Status failure;  // not ok: ends once nothing is in flight
  };
  struct Window {
    std::unique_ptr<PeerWindow> memory;
    std::uint32_t generation = 0;
    bool granted = false;
  };
  struct LinkWindows {
    std::map<std::uint32_t, Window> slots;
    std::vector<std::uint32_t> free;  // granted and unused
    std::deque<Lane*> queue;          // lanes that may have something ready; served in turn
    std::size_t open = 0;             // lanes that have something left to pack
    std::size_t tickets = 0;          // that wait for their request
    bool released = false;            // the receiver may take this side for sated: say so before the next frame
    bool recalled = false;            // others need the slots: none is kept idle
  };
  enum class Stage : std::uint8_t { kPacking, kPutting };
  struct Transfer {
    Lane* lane = nullptr;
    wire::Frame frame;
    const LayerPlan* plan = nullptr;
    RemapTask task;
    Stage stage = Stage::kPacking;
    std::uint32_t slot = 0;
    std::unique_ptr<OwnWindow> staging;  // null: packed straight into the window
    bool direct = true;                  // gets into the window by this side's own stores or copies, not by UCX
    bool ahead = false;                  // launched before the caller's work had ended
    transport::Op put;
    transport::Op flush;
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
    std::uint64_t at_ns;
    Status why;
    std::vector<std::string> told;  // peers that know
    bool final = false;             // by `reject`: all are told, always
  };

  void on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) override;
  bool step(std::uint64_t now) override;
  bool busy() const override { return !transfers_.empty(); }
  bool watching() const override { return busy() ? device_ != nullptr : unready_; }
  bool expecting() const override;
  std::uint64_t deadline() const override;
  void on_link_up(Link& link) override;
  void on_link_lost(Link& link, const Status& status) override;
  bool link_drained(const Link& link) const override;
  bool link_idle(const Link& link) const override;
  void on_link_closed(Link& link) override;
  void on_stop(const Status& status) override;
  void on_ended() override;

  void on_ticket(Link& link, const wire::Prelude& prelude, wire::Ticket ticket);
  void on_grant(Link& link, const wire::Grant& grant);
  void on_done(Link& link, const wire::Prelude& prelude, const wire::Done& done);
  void on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort);
  using Pending = std::multimap<wire::RequestId, PendingTicket>;
  void take_ticket(const wire::RequestId& id, PendingTicket ticket);
  Pending::iterator drop_ticket(Pending::iterator at);
  Status check_ticket(const Request& request, const PendingTicket& ticket) const;
  void add_lane(Request& request, PendingTicket ticket);
  bool feed(Link& link);
  void post_layer(std::uint64_t handle, Ready ready);
  bool may_start(Lane& lane, bool* ahead);
  void launch(Link& link, Lane& lane, wire::TokenRange tokens, std::unique_ptr<Transfer> transfer);
  void queue(Lane& lane);
  void unqueue(Lane& lane);
  bool find_ready(Lane& lane, wire::TokenRange* tokens);
  void next_frame(Lane& lane, wire::TokenRange tokens, std::size_t slot_bytes, Transfer* transfer);
  Status take_staging(Where window, Transfer* transfer);
  bool advance(Transfer& transfer);  // true: it has ended
  void on_packed(Transfer& transfer);
  void commit(Transfer& transfer);
  void cancel(Lane& lane);
  void release(Link& link);
  void release_idle(Link& link);
  void fail(Request& request, Status status, const Link* told_by = nullptr);
  void reject(Link& link, const wire::RequestId& id, std::uint64_t epoch, Status why);
  void conclude(Request& request);  // may erase it
  void remember(const wire::RequestId& id, Ended ended);
  void erase(Request& request);
  bool sweep(std::uint64_t now);
  void sweep_tickets(std::uint64_t now);
  Request* find(const wire::RequestId& id);

  std::atomic<std::uint64_t> next_handle_{1};
  std::map<std::uint64_t, Request> requests_;  // in order of submission
  std::map<wire::RequestId, std::uint64_t> handles_;
  Pending pending_;
  std::map<wire::RequestId, Ended> ended_;
  std::deque<std::pair<std::uint64_t, wire::RequestId>> ended_order_;  // (at_ns, id), oldest first
  std::list<std::unique_ptr<Transfer>> transfers_;
  std::map<std::uint32_t, LinkWindows> windows_;        // per link
  std::vector<std::unique_ptr<OwnWindow>> staging_[2];  // unused, by `Where`
  int staging_made_[2] = {0, 0};
  int ahead_ = 0;         // transfers that wait in a stream for the caller's work
  bool unready_ = false;  // a lane's next layer was still being computed when it was last looked at
  std::set<std::pair<std::uint64_t, std::uint64_t>> deadlines_;  // (deadline_ns, handle)
  std::uint64_t pending_deadline_ns_ = 0;                        // no pending ticket ends before it
  std::vector<std::uint64_t> failed_;                            // handles that end once nothing is in flight
};

}  // namespace hetkv::engine
