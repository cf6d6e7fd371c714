#include "engine/sender.h"

#include <algorithm>

namespace hetkv::engine {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint32_t kMostLayers = 1 << 16;
// Waves of one stream that packs may wait for in a stream, so that they start without the host.
constexpr std::size_t kMostAdmitted = 4;

}  // namespace

bool Lane::find_next(wire::TokenRange* tokens) {
  const auto& plans = link->config.plans;
  const auto& sent = request->ready;
  for (; ready < sent.size(); ++ready, plan = 0, token = 0) {
    const Ready& item = sent[ready];
    plan = std::max(plan, link->first_plan(item.layer));
    for (; plan < plans.size() && plans[plan].layer == item.layer; ++plan, token = 0) {
      const wire::TokenRange& asked = want[plans[plan].group];
      tokens->start = std::max({item.start, asked.start, token});
      tokens->stop = std::min(item.stop, asked.stop);
      if (tokens->start < tokens->stop) return true;
    }
  }
  return false;
}

Sender::~Sender() {
  stop();
}

Status Sender::submit(Submission submission, std::shared_ptr<Outcome>* out) {
  const auto outcome = outcomes_.open(submission.id);
  if (outcome == nullptr) return Status::error(Code::kInvalid, "a request with this id is under way already");
  *out = outcome;
  const bool posted = post([this, outcome, submission = std::move(submission)]() mutable {
    const std::uint64_t handle = outcome->handle;
    ended_.erase(submission.id);
    Request& request = requests_[handle];
    request.outcome = std::move(outcome);
    request.handle = handle;
    request.id = submission.id;
    request.tokens = std::move(submission.tokens);
    request.content = submission.content;
    request.priority = submission.priority;
    for (auto& blocks : submission.blocks) {
      request.blocks.push_back(std::make_shared<const std::vector<std::int32_t>>(std::move(blocks)));
    }
    if (submission.hold_ms > 0) {
      request.deadline_ns = now_ns() + submission.hold_ms * kMs;
      deadlines_.emplace(request.deadline_ns, handle);
    }
    handles_[request.id] = handle;
    const auto waiting = pending_.equal_range(submission.id);
    std::vector<PendingTicket> tickets;
    for (auto at = waiting.first; at != waiting.second; at = drop_ticket(at)) tickets.push_back(at->second);
    for (const auto& ticket : tickets) take_ticket(submission.id, ticket);
    for (const auto& ticket : tickets) {  // slots that came while a ticket waited which is rejected now
      if (ticket.link->up()) release_idle(*ticket.link);
    }
  });
  if (posted) return {};
  outcomes_.forget(**out);
  return Status::error(Code::kClosed, "the sender's progress thread has ended");
}

void Sender::extend(std::uint64_t handle, std::size_t group, std::vector<std::int32_t> blocks) {
  post([this, handle, group, blocks = std::move(blocks)] {
    const auto found = requests_.find(handle);
    if (found == requests_.end() || group >= found->second.blocks.size()) return;
    auto grown = std::make_shared<std::vector<std::int32_t>>(*found->second.blocks[group]);
    grown->insert(grown->end(), blocks.begin(), blocks.end());
    found->second.blocks[group] = std::move(grown);
  });
}

void Sender::send_batch(std::shared_ptr<const SendBatch> batch, std::int32_t layer) {
  post([this, batch = std::move(batch), layer] { add_batch(*batch, layer, nullptr); });
}

Status Sender::send_batch(std::shared_ptr<const SendBatch> batch, std::int32_t layer, void* stream) {
  After after;
  if (auto status = record(stream, &after); !status.ok()) return status;
  post([this, batch = std::move(batch), layer, after = std::move(after), stream] {
    add_batch(*batch, layer, make_wave(after, stream, batch->handles));
  });
  return {};
}

void Sender::send_layer(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens) {
  post([=] { add_ready(handle, layer, tokens, nullptr); });
}

Status Sender::send_layer(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens, void* stream) {
  After after;
  if (auto status = record(stream, &after); !status.ok()) return status;
  post([=, after = std::move(after)] { add_ready(handle, layer, tokens, make_wave(after, stream, {handle})); });
  return {};
}

Status Sender::record(void* stream, After* out) {
  if (device_ == nullptr) return Status::error(Code::kInvalid, "the pool is in host memory: it has no streams");
  return device_->record_caller(stream, out);
}

Path Sender::path(std::uint32_t link) {
  Path path = Path::kNone;
  call([&] {
    const auto found = windows_.find(link);
    if (found == windows_.end()) return;
    for (const auto& [slot, window] : found->second.slots) {
      if (window.memory != nullptr) path = window.memory->path();
    }
  });
  return path;
}

void Sender::abort(std::uint64_t handle, std::string reason) {
  post([this, handle, reason = std::move(reason)] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) fail(found->second, Status::error(Code::kAborted, reason));
  });
}

// --- what is ready ---

// Null where `after` has happened.
std::shared_ptr<Wave> Sender::make_wave(const After& after, const void* stream, std::vector<std::uint64_t> requests) {
  if (after->happened()) return nullptr;
  auto wave = std::make_shared<Wave>();
  wave->after = after;
  wave->requests = std::move(requests);
  waves_[stream].push_back(wave);
  return wave;
}

void Sender::add_batch(const SendBatch& batch, std::int32_t layer, const std::shared_ptr<Wave>& wave) {
  const auto& groups = config_.layer_groups;
  const auto first = layer == kAllLayers ? 0u : static_cast<std::uint32_t>(layer);
  const auto last = layer == kAllLayers ? static_cast<std::uint32_t>(groups.size()) : first + 1;
  for (std::uint32_t at = first; at < last && at < groups.size(); ++at) {
    const auto group = static_cast<std::size_t>(groups[at]);
    if (groups[at] < 0 || group >= batch.tokens.size()) continue;
    const auto& ranges = batch.tokens[group];
    for (std::size_t i = 0; i < batch.handles.size(); ++i) add_ready(batch.handles[i], at, ranges[i], wave);
  }
}

void Sender::add_ready(std::uint64_t handle, std::uint32_t layer, wire::TokenRange tokens,
                       const std::shared_ptr<Wave>& wave) {
  const auto found = requests_.find(handle);
  if (found == requests_.end() || !found->second.failure.ok() || tokens.start >= tokens.stop) return;
  if (layer >= kMostLayers) return;
  Request& request = found->second;
  if (request.sent.size() <= layer) request.sent.resize(layer + 1);
  if (!request.sent[layer].add(tokens)) {
    return fail(request,
                Status::error(Code::kInvalid, "tokens " + range_text(tokens.start, tokens.stop) + " of layer " +
                                                  std::to_string(layer) + " overlap tokens that were sent before"));
  }
  request.ready.push_back({layer, tokens.start, tokens.stop, wave});
  for (auto& lane : request.lanes) {
    if (lane.place == Lane::Place::kNone) place(lane);
    awaken(*lane.link);
  }
}

// Waves of one stream are computed in its order, so that one query a stream tells.
bool Sender::watch_waves() {
  bool moved = false;
  for (auto at = waves_.begin(); at != waves_.end();) {
    auto& waiting = at->second;
    while (!waiting.empty() && waiting.front()->after->happened()) {
      const auto wave = std::move(waiting.front());
      waiting.pop_front();
      wave->after.reset();
      place_all(*wave);
      moved = true;
    }
    for (std::size_t i = 0; i < std::min(kMostAdmitted, waiting.size()); ++i) {
      if (std::exchange(waiting[i]->admitted, true)) continue;
      place_all(*waiting[i]);
      moved = true;
    }
    at = waiting.empty() ? waves_.erase(at) : std::next(at);
  }
  return moved;
}

void Sender::place_all(const Wave& wave) {
  for (const std::uint64_t handle : wave.requests) {
    const auto found = requests_.find(handle);
    if (found == requests_.end()) continue;
    for (auto& lane : found->second.lanes) {
      if (lane.place != Lane::Place::kReady) place(lane);
    }
  }
}

// Puts the lane where its next layer belongs.
void Sender::place(Lane& lane) {
  unplace(lane);
  wire::TokenRange tokens;
  if (lane.cancelled || lane.unsent == 0 || !lane.find_next(&tokens)) return;
  const Wave* wave = lane.request->ready[lane.ready].wave.get();
  const bool computed = wave == nullptr || wave->computed();
  if (!computed && !wave->admitted) return;
  LinkWindows& windows = windows_[lane.link->id];
  lane.place = computed ? Lane::Place::kReady : Lane::Place::kAhead;
  (computed ? windows.ready : windows.ahead).add(lane);
  awaken(*lane.link);
}

void Sender::unplace(Lane& lane) {
  if (lane.place == Lane::Place::kNone) return;
  LinkWindows& windows = windows_[lane.link->id];
  const bool computed = lane.place == Lane::Place::kReady;
  (computed ? windows.ready : windows.ahead).remove(lane);
  lane.place = Lane::Place::kNone;
}

void Sender::awaken(const Link& link) {
  LinkWindows& windows = windows_[link.id];
  if (!std::exchange(windows.awake, true)) awake_.push_back(link.id);
}

bool Sender::step(std::uint64_t now) {
  mover_->poll(&packed_);
  bool moved = !packed_.empty();
  for (RemapTask* task : std::exchange(packed_, {})) on_packed(*static_cast<Bundle*>(task->owner));
  moved |= advance_puts();
  notice_slow_puts(now);
  moved |= watch_waves();
  moved |= feed_links();
  moved |= sweep(now);
  stats_.pending_tickets = pending_.size();
  return moved;
}

// Each link that has something to start starts one bundle, so that messages and other links come in between. True too
// where a link was awakened by another one's: it has its turn next.
bool Sender::feed_links() {
  bool moved = false;
  for (std::size_t count = awake_.size(); count > 0; --count) {
    const std::uint32_t id = awake_.front();
    awake_.pop_front();
    const auto found = links_.find(id);
    const auto windows = windows_.find(id);
    if (windows == windows_.end()) continue;
    windows->second.awake = false;
    if (found == links_.end() || !found->second->up()) {
      leave(id, nullptr);
    } else if (feed(*found->second)) {
      moved = true;
      awaken(*found->second);
    }
  }
  return moved || !awake_.empty();
}

}  // namespace hetkv::engine
