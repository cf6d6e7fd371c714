// The decode side: gives tickets and slots, checks every frame against what it asked for, unpacks, and says when a
// layer, a route and a request are complete. Nothing outside a ticket's blocks is ever written.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/mover.h"
#include "engine/ranges.h"
#include "engine/reread.h"
#include "engine/slots.h"
#include "engine/stream_gates.h"

namespace hetkv::engine {

// What to receive. `want` and `blocks` are per cache group; `blocks` cover `want` and hold each block once.
struct Intake {
  wire::RequestId id{};
  std::vector<wire::TokenRange> want;
  std::vector<std::vector<std::int32_t>> blocks;
  std::vector<std::uint32_t> links;      // who sends a part of it
  std::uint32_t lease_ms = 0;            // the request must be complete within
  std::optional<wire::Content> content;  // the senders reject the ticket where theirs is another one
};

class Receiver final : public Engine {
 public:
  Receiver(const EngineConfig& config, Parts parts);
  ~Receiver() override;
  Status start(bool threaded = true) override;

  // Both return at once. A handle is never reused; abort of one that has ended does nothing.
  // kInvalid: a request with this id is under way; kClosed: the engine has ended. A link that is down ends the outcome
  // with kPeerLost.
  Status receive(Intake intake, std::shared_ptr<Outcome>* out);
  void abort(std::uint64_t handle, std::string reason);
  // The lost link's peer has ended or acknowledged: what it held of the window may be used again.
  void retire_link(std::uint32_t link);
  // Makes a stream of the pool's device wait for a layer (StreamGates::kAll: for the whole request) to be verified and
  // in the pool, or for the request's end. Returns at once. Errors: those of StreamGates::wait; kInvalid for a pool in
  // host memory. Any thread, as the two above.
  Status wait_stream(Outcome& outcome, std::int32_t layer, void* stream);
  // For tests: the epoch of a request's ticket; 0 where it has ended.
  std::uint64_t epoch(std::uint64_t handle);

 private:
  friend struct Inspect;  // of tests/sim
  static constexpr std::uint64_t kAbsent = ~std::uint64_t{0};
  // One link's part of a request.
  struct Part {
    std::shared_ptr<Link> link;
    std::uint64_t remaining = 0;  // tokens summed over the link's plans
    std::vector<RangeSet> seen;   // per plan
    std::uint64_t frames = 0;
    std::uint64_t bytes = 0;
    bool done = false;
  };
  struct Request {
    std::shared_ptr<Outcome> outcome;
    std::uint64_t handle = 0;
    wire::RequestId id{};
    std::uint64_t epoch = 0;
    std::vector<wire::TokenRange> want;
    std::vector<BlockTable> blocks;
    std::list<Part> parts;
    std::vector<std::uint64_t> missing;  // tokens, by layer over all parts; kAbsent: no layer of this side
    std::uint64_t deadline_ns = 0;
    std::uint32_t unpacking = 0;
    Status failure;
  };
  static constexpr std::size_t kExact = ~std::size_t{0};
  struct Piece {
    Request* request = nullptr;
    Part* part = nullptr;
    const LayerPlan* plan = nullptr;
    wire::Record record;
    std::size_t expected = kExact;  // its frame in Unpack::expected; exact: the pool must have the record's checksum
  };
  // One bundle, without the frames that were not admitted.
  struct Unpack {
    std::vector<Piece> pieces;
    RemapTask task;
    RemapTask expected;  // with `verify_bytes`: what the pool must hold, of frames whose unpack changes bits,
    RemapTask reread;    // and what it holds
    std::uint32_t slot = 0;
    bool holds_slot = true;
    std::list<std::unique_ptr<Unpack>>::iterator self;
  };
  // Slots that a link holds, when it was last granted one, and its number: who is served first among those that want
  // one.
  using Rank = std::tuple<std::size_t, std::uint64_t, std::uint32_t>;
  // What the receiver knows of a sender's wishes.
  struct Demand {
    bool hungry = false;                          // it can use slots
    bool recalled = false;                        // it was asked to give unused ones back, and has not answered
    std::size_t open = 0;                         // parts of unfinished requests that it still has to send
    std::uint64_t served = 0;                     // when it was last granted a slot
    std::optional<Rank> ranked;                   // where it is in `wanting_`
    std::map<std::uint32_t, std::uint32_t> keys;  // slot -> generation whose key the link has
  };

  void on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) override;
  void* place(Link& link, wire::SlotName slot, std::uint64_t offset, std::uint64_t bytes) override;
  bool step(std::uint64_t now) override;
  bool busy() const override { return !unpacks_.empty(); }
  bool watching() const override { return device_ != nullptr && busy(); }
  bool expecting() const override { return !requests_.empty(); }
  std::uint64_t deadline() const override { return deadlines_.empty() ? 0 : deadlines_.begin()->first; }
  void on_link_up(Link& link) override;
  void on_link_lost(Link& link, const Status& status) override;
  bool link_drained(const Link&) const override { return true; }
  bool link_idle(const Link&) const override { return true; }
  void on_link_closed(Link& link) override;
  void on_stop(const Status& status) override;
  void on_ended() override;
  void on_arrived(const Outcome& outcome, std::int32_t layer) override;

  void on_frame(Link& link, const wire::Prelude& prelude, const wire::Frame& frame);
  void on_release(Link& link, const wire::Release& release);
  void on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort);
  void on_bundle(Link& link, const wire::Bundle& bundle);
  static Part* part_of(Request& request, const Link& link);
  Status admit(Request& request, Part& part, const wire::Record& record, std::size_t slot_bytes,
               const LayerPlan** plan);
  std::unique_ptr<Unpack> make_unpack();
  void keep(std::unique_ptr<Unpack> unpack);
  void submit(RemapTask& task, Unpack& unpack);
  void go_on(RemapTask& task);
  Status plan_reread(Unpack& unpack);
  Status scratch(std::uint64_t bytes, std::uint64_t* address);
  bool pool_differs(const Unpack& unpack, std::size_t piece) const;
  void free_slot(Unpack& unpack);
  void finish(Unpack& unpack);
  void finish(const Unpack& unpack, std::size_t at);
  void complete(Request& request);
  void fail(Request& request, Status status, const Link* reporter = nullptr);
  void rank(std::uint32_t link);
  void give_back(std::uint32_t slot);
  bool grant();
  void recall();
  void close_part(const Part& part);
  void erase(Request& request);
  bool sweep(std::uint64_t now);
  Request* find(const wire::RequestId& id, std::uint64_t epoch);

  void retire(std::uint32_t link);
  void flush_rdma();
  Where where(const Link& link) const { return link.device_windows ? Where::kDevice : Where::kHost; }

  SlotPool slots_;
  std::unique_ptr<OwnWindow> scratch_;            // of `verify_bytes`; a buffer where the pool is on a device
  std::unique_ptr<DeviceBuffer> device_scratch_;  // made at the start: allocation may wait for the device
  std::unique_ptr<StreamGates> gates_;            // where the pool is on a device
  std::uint64_t next_epoch_;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::unordered_map<wire::RequestId, std::uint64_t, IdHash> handles_;
  std::list<std::unique_ptr<Unpack>> unpacks_;
  std::vector<std::unique_ptr<Unpack>> unused_;
  std::vector<RemapTask*> unpacked_;  // of one turn
  std::unordered_map<std::uint32_t, Demand> demands_;
  std::set<Rank> wanting_;
  std::set<std::pair<std::uint64_t, std::uint64_t>> deadlines_;  // (deadline_ns, handle)
  std::vector<std::uint64_t> failed_;                            // handles that end once nothing is being unpacked
  bool slots_moved_ = false;                                     // a slot was freed or asked for since the last grants
  std::uint64_t grants_ = 0;
};

}  // namespace hetkv::engine
