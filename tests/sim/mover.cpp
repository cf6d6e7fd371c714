#include "mover.h"

#include <algorithm>
#include <utility>

namespace hetkv::sim {
namespace {

constexpr std::uint64_t kMostSlow = 3 * kSecond;  // of a part that waits for its device

}  // namespace

using engine::RemapTask;

SimMover::SimMover(Network& network, Site& site, std::shared_ptr<const Clock> clock)
    : network_(network), site_(site), cpu_(1, std::move(clock)), self_(std::make_shared<SimMover*>(this)) {}

void SimMover::submit(RemapTask* task) {
  World& world = network_.world;
  auto move = std::make_shared<Move>();
  move->task = task;
  for (std::size_t i = 0; i < task->frames.size(); ++i) move->left.push_back(i);
  if (network_.profile.most_move == 0) {
    for (std::size_t part : move->left) run(*task, part);
    task->done = true;
    return;
  }
  for (std::size_t i = move->left.size(); i > 1; --i) std::swap(move->left[i - 1], move->left[world.random.below(i)]);
  move->fails = network_.chance(network_.profile.bad_move);
  if (move->fails && network_.on_damage) network_.on_damage(site_.id, site_.id);
  moves_.push_back(move);
  go_on(move);
}

void SimMover::go_on(const std::shared_ptr<Move>& move) {
  World& world = network_.world;
  const std::uint64_t most = network_.chance(network_.profile.slow_move) ? kMostSlow : network_.profile.most_move;
  world.after(world.random.delay(most), [self = std::weak_ptr<SimMover*>(self_), move] {
    const auto here = self.lock();
    if (here == nullptr || move->over) return;
    SimMover& mover = **here;
    if (mover.site_.paused && !mover.network_.profile.moves_while_paused) return mover.go_on(move);
    if (move->left.empty() || (move->fails && mover.network_.world.random.chance(0.3))) return mover.end(move);
    mover.run(*move->task, move->left.back());
    move->left.pop_back();
    mover.go_on(move);
  });
}

void SimMover::run(RemapTask& task, std::size_t part) {
  std::size_t first = 0;
  for (std::size_t i = 0; i < part; ++i) first += task.frames[i].num_jobs;
  RemapTask one;
  one.jobs.assign(task.jobs.begin() + static_cast<std::ptrdiff_t>(first),
                  task.jobs.begin() + static_cast<std::ptrdiff_t>(first + task.frames[part].num_jobs));
  one.frames.push_back(task.frames[part]);
  for (const remap::Job& job : one.jobs) {
    const SegmentMap& wire = job.wire == remap::WireSide::kSource ? job.src.map : job.dst.map;
    const auto bytes = static_cast<std::size_t>(job.tokens * job.heads * job.channels * item_size(wire.dtype));
    if (!site_.space.holds(wire.base, (bytes + 7) / 8 * 8)) {
      network_.world.violate("a pack or unpack touches a slot or buffer that is not mapped");
      return;
    }
  }
  if (one.jobs.front().wire == remap::WireSide::kDestination) {
    network_.on_write(site_.id, one.jobs.front().dst.map.base);
  }
  const bool unpacks = one.jobs.front().wire == remap::WireSide::kSource;
  cpu_.submit(&one);
  if (unpacks && network_.profile.rewritten > 0 && network_.chance(network_.profile.rewritten))
    rewrite(one.jobs.front());
  task.frames[part].result = one.frames[0].result;
  if (on_moved) on_moved();
}

// Somebody else writes to what was unpacked, before it is read again.
void SimMover::rewrite(const remap::Job& job) {
  const remap::Side& pool = job.dst;
  const std::uint64_t at = address(pool.map, pool.blocks, pool.first_token, pool.first_head, 0);
  *reinterpret_cast<std::uint8_t*>(at) ^= static_cast<std::uint8_t>(1u << network_.world.random.below(8));
  network_.world.note("process {}: something else writes to its pool", site_.id);
  if (network_.on_damage) network_.on_damage(site_.id, site_.id);
}

void SimMover::end(const std::shared_ptr<Move>& move) {
  move->over = true;
  moves_.remove(move);
  if (move->fails) move->task->status = Status::error(Code::kDevice, "simulated: the device failed");
  done_.push_back(move->task);
  site_.wake();
}

void SimMover::poll(std::vector<RemapTask*>* done) {
  for (RemapTask* task : std::exchange(done_, {})) {
    task->done = true;
    done->push_back(task);
  }
}

void SimMover::drain() {
  while (!moves_.empty()) {
    const auto move = moves_.front();
    for (const std::size_t part : std::exchange(move->left, {})) run(*move->task, part);
    end(move);
  }
}

void SimMover::die() {
  while (!moves_.empty()) {
    const auto move = moves_.front();
    move->fails = true;
    end(move);
  }
}

}  // namespace hetkv::sim
