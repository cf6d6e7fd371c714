// The prefill side: takes layers as they are computed, waits for tickets, packs frames and puts them into windows.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "engine/mover.h"

namespace hetkv {

// What the sender holds of one request. `tokens` and `blocks` are per cache group.
struct Submission {
  wire::RequestId id{};
  std::vector<std::uint64_t> tokens;               // tokens that the request will have when all are computed
  std::vector<std::vector<std::int32_t>> blocks;   // block ids in token order; may grow by `extend`
  std::uint64_t hold_ms = 0;                       // blocks are held this long for tickets and their completion; 0: no limit
};

class Sender final : public Engine {
 public:
  Sender(const EngineConfig& config, std::unique_ptr<Mover> mover);
  ~Sender() override;

  // All return at once. A handle is never reused; calls with a handle that has ended do nothing.
  std::uint64_t submit(Submission submission);
  void extend(std::uint64_t handle, std::size_t group, std::vector<std::int32_t> blocks);
  // Tokens [start, stop) of a global layer are in the pool and stay there unchanged until kPacked or kFailed.
  void send_layer(std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop);
  void abort(std::uint64_t handle, std::string reason);

 private:
  struct Ready {
    std::uint32_t layer;
    std::uint64_t start;
    std::uint64_t stop;
  };
  // One ticket on one link. `remaining` counts tokens over all plans that are not packed yet.
  struct Request;
  struct Lane {
    Request* request = nullptr;
    Link* link = nullptr;
    std::uint64_t epoch = 0;
    std::vector<wire::TokenRange> want;
    std::uint64_t remaining = 0;
    std::size_t ready = 0;    // cursor: next ready item,
    std::size_t plan = 0;     // plan of the link,
    std::uint64_t token = 0;  // and token inside it
    std::uint32_t in_flight = 0;
    bool delivered = false;
    bool cancelled = false;
  };
  struct Request {
    std::uint64_t handle = 0;
    wire::RequestId id{};
    std::vector<std::uint64_t> tokens;
    std::vector<BlockTable> blocks;
    std::vector<Ready> ready;
    std::list<Lane> lanes;
    std::uint64_t deadline_ns = 0;
    std::uint32_t packing = 0;  // packs in flight
    bool packed = false;
    Status failure;  // not ok: ends once nothing is in flight
  };
  struct Window {
    std::unique_ptr<ucx::RemoteMemory> memory;
    std::uint32_t generation = 0;
    bool granted = false;
  };
  struct LinkWindows {
    std::map<std::uint32_t, Window> slots;
    std::vector<std::uint32_t> free;  // granted and unused
    std::vector<Lane*> lanes;         // with something left to pack; served in turn
    std::size_t turn = 0;
    bool released = false;  // slots were given back and none was granted since: ask before the next frame
  };
  enum class Stage : std::uint8_t { kPacking, kPutting };
  struct Transfer {
    Lane* lane = nullptr;
    wire::Frame frame;
    const LayerPlan* plan = nullptr;
    RemapTask task;
    Stage stage = Stage::kPacking;
    std::uint32_t slot = 0;
    int staging = -1;  // -1: packed straight into the window
    ucx::Op put;
    ucx::Op flush;
  };
  struct PendingTicket {
    Link* link;
    std::uint64_t epoch;
    std::vector<wire::TokenRange> want;
    std::uint64_t deadline_ns;
  };

  void on_message(Link& link, const wire::Prelude& prelude, const std::uint8_t* data, std::size_t size) override;
  bool step(std::uint64_t now) override;
  bool busy() const override { return !transfers_.empty(); }
  bool waiting() const override { return !requests_.empty() || !pending_.empty(); }
  void on_link_up(Link& link) override;
  void on_link_lost(Link& link, const Status& status) override;
  bool link_drained(const Link& link) const override;
  void on_link_closed(Link& link) override;
  void on_stop() override;

  void on_ticket(Link& link, const wire::Prelude& prelude, wire::Ticket ticket);
  void on_grant(Link& link, const wire::Grant& grant);
  void on_recall(Link& link, const wire::Release& recall);
  void on_done(Link& link, const wire::Prelude& prelude);
  void on_abort(Link& link, const wire::Prelude& prelude, const wire::Abort& abort);
  void add_lane(Request& request, Link& link, std::uint64_t epoch, std::vector<wire::TokenRange> want);
  bool feed(Link& link);
  bool find_ready(Lane& lane, wire::TokenRange* tokens);
  void next_frame(Lane& lane, wire::TokenRange tokens, std::size_t slot_bytes, Transfer* transfer);
  bool take_staging(Transfer* transfer);
  bool advance(Transfer& transfer);  // true: it has ended
  void on_packed(Transfer& transfer);
  void commit(Transfer& transfer);
  void cancel(Lane& lane);
  void give_back(Link& link, std::uint32_t slot);
  void release_idle(Link& link);
  void fail(Request& request, Status status, const Link* told_by = nullptr);
  void refuse(Link& link, const wire::RequestId& id, std::uint64_t epoch, Status why);
  void check_packed(Request& request);
  bool sweep(std::uint64_t now);
  Request* find(const wire::RequestId& id);

  std::unique_ptr<Mover> mover_;
  std::atomic<std::uint64_t> next_handle_{1};
  std::map<std::uint64_t, Request> requests_;  // in order of submission
  std::map<wire::RequestId, std::uint64_t> handles_;
  std::multimap<wire::RequestId, PendingTicket> pending_;
  std::list<std::unique_ptr<Transfer>> transfers_;
  std::map<std::uint32_t, LinkWindows> windows_;  // per link
  std::vector<std::unique_ptr<ucx::Memory>> staging_;
  std::vector<int> free_staging_;
  bool ended_ = false;  // a request has failed, or work on it has ended, since the last sweep
  std::uint64_t swept_ns_ = 0;
};

}  // namespace hetkv
