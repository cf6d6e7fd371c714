// Requests of a simulated fleet: what each side asks of its engine, and what it must hear.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fleet.h"

namespace hetkv::sim {

struct Counts {
  std::uint64_t transfers = 0;
  std::uint64_t complete = 0;  // on all sides
  std::uint64_t failed = 0;    // on some
  std::uint64_t unbegun = 0;   // a side had no link or no blocks, or was dead
  std::uint64_t layers = 0;    // compared with what they must be
  std::uint64_t again = 0;     // under the id of one that has just failed
};

struct Transfer;

// One process's part of a transfer.
struct Side {
  Transfer* transfer = nullptr;
  Process* process = nullptr;  // from when it begins
  std::uint32_t rank = 0;
  std::shared_ptr<engine::Outcome> outcome;  // null: it has not begun
  Blocks blocks;
  std::vector<bool> arrived;  // receiver: by layer
  std::uint64_t begun = 0;
  bool ended = false;  // an event said so, never begun, or its process died
  bool complete = false;
  bool packed = false;
  std::function<void()> then;  // once it has ended
};

struct Transfer {
  std::uint64_t number = 0;
  wire::RequestId id{};
  std::uint64_t content = 0;
  std::uint64_t tokens = 0;
  std::uint64_t kept = 0;                 // the receivers have them
  std::uint64_t asked = 0;                // the receivers ask for them; more than `tokens` in some
  std::optional<wire::Content> bound[2];  // to which content senders and receivers bind it
  std::uint32_t lease_ms = 0;
  std::uint64_t hold_ms = 0;
  std::uint64_t begun = ~std::uint64_t{0};  // first side
  bool stalled = false;
  bool may_fail = false;
  bool must_fail = false;
  bool followed = false;  // by another one under its id,
  bool follows = false;   // or is that one: a side of the one may meet a side of the other
  bool counted = false;
  std::uint32_t instance[2] = {};
  std::vector<std::unique_ptr<Side>> sides[2];  // senders, receivers; by rank

  wire::TokenRange want() const { return {kept, asked}; }
};

class Transfers {
 public:
  Transfers(Fleet& fleet, const Profile& profile);

  // One request between some instances, from now on.
  void begin();
  bool over() const { return open().empty(); }
  std::string open() const;  // which have not ended, or have blocks yet
  const Counts& counts() const { return counts_; }
  const std::vector<std::unique_ptr<Transfer>>& all() const { return transfers_; }

 private:
  // transfers.cpp: what is asked
  Transfer& draw();
  void plan(Transfer& transfer, int attempts);
  bool reserve(Transfer& transfer);
  void follow(Transfer& before);
  void begin_sender(Side& side);
  void begin_receiver(Side& side);
  void begun(Side& side, std::shared_ptr<engine::Outcome> outcome, std::uint64_t within);
  void compute(Side& side);
  void never(Side& side);
  void abort(Side& side);
  std::vector<std::uint64_t> by_group(std::uint64_t tokens) const;

  // verdicts.cpp: what is reported
  void expect_end(Side& side, std::uint64_t within);
  void expect_all_ended(const Transfer& transfer);
  void on_event(Process& process, const engine::Event& event);
  void on_send_event(Side& side, const engine::Event& event);
  void on_receive_event(Side& side, const engine::Event& event);
  void on_failed(Side& side, const engine::Event& event);
  void on_death(Process& process, bool orderly);
  void release(Side& side);
  void end(Side& side);
  bool excused(const Transfer& transfer) const;
  bool asked_before(const Side& sender, const Side& receiver) const;

  Fleet& fleet_;
  World& world_;
  const Profile& profile_;
  Counts counts_;
  std::vector<std::unique_ptr<Transfer>> transfers_;
  std::map<std::pair<const Process*, std::uint64_t>, Side*> by_handle_;
  std::vector<std::pair<wire::RequestId, bool>> old_ids_;  // of transfers that are over, and whether one failed
  std::uint64_t next_ = 1;
};

}  // namespace hetkv::sim
