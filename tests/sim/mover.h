// Packs and unpacks of a simulated process: the CPU's own, part by part at times of the simulation's choice, or at
// once.
#pragma once

#include <list>
#include <memory>
#include <vector>

#include "engine/mover.h"
#include "network.h"

namespace hetkv::sim {

class SimMover final : public engine::Mover {
 public:
  SimMover(Network& network, Site& site, std::shared_ptr<const Clock> clock);

  void submit(engine::RemapTask* task) override;
  void poll(std::vector<engine::RemapTask*>* done) override;
  void drain() override;

  // What is in flight ends with an error, and nothing of it runs.
  void die();
  bool idle() const { return moves_.empty() && done_.empty(); }
  // Called after each part.
  std::function<void()> on_moved;

 private:
  struct Move {
    engine::RemapTask* task = nullptr;
    std::vector<std::size_t> left;  // parts, in the order in which they run
    bool fails = false;
    bool over = false;
  };
  void go_on(const std::shared_ptr<Move>& move);
  void run(engine::RemapTask& task, std::size_t part);
  void rewrite(const remap::Job& job);
  void end(const std::shared_ptr<Move>& move);

  Network& network_;
  Site& site_;
  engine::CpuMover cpu_;
  std::list<std::shared_ptr<Move>> moves_;
  std::vector<engine::RemapTask*> done_;
  std::shared_ptr<SimMover*> self_;  // null once this is gone
};

}  // namespace hetkv::sim
