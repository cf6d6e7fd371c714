#include "engine/sender.h"

#include <algorithm>
#include <atomic>

#include "engine/ranges.h"

namespace hetkv::engine {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kTokenAlignment =
    64;  // frames start at multiples of it where they can: whole blocks, full vectors
// Frames that may wait in a stream for the caller's work, so that they start without the host. They hold slots, so
// there are few; further ones start when the host has seen that work end.
constexpr int kMostAhead = 4;

}  // namespace

Sender::Sender(const EngineConfig& config, std::unique_ptr<Mover> mover, std::shared_ptr<Device> device)
    : Engine(config, std::move(mover), std::move(device)) {}

Sender::~Sender() {
  stop();
}

std::uint64_t Sender::submit(Submission submission) {
  const std::uint64_t handle = next_handle_.fetch_add(1);
  const bool posted = post([this, handle, submission = std::move(submission)]() mutable {
    if (handles_.count(submission.id) != 0) {
      events_.push({EventKind::kFailed, handle, 0, -1,
                    Status::error(Code::kInvalid, "a request with this id is in progress already")});
      return;
    }
    ended_.erase(submission.id);
    Request& request = requests_[handle];
    request.handle = handle;
    request.id = submission.id;
    request.tokens = std::move(submission.tokens);
    request.content = submission.content;
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
  return posted ? handle : 0;
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

Status Sender::send_layer(std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop,
                          void* stream) {
  if (device_ == nullptr) return Status::error(Code::kInvalid, "the pool lies in host memory: it has no streams");
  After after;
  if (auto status = device_->record_caller(stream, &after); !status.ok()) return status;
  post_layer(handle, {layer, start, stop, std::move(after)});
  return {};
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

void Sender::post_layer(std::uint64_t handle, Ready ready) {
  post([this, handle, ready = std::move(ready)] {
    const auto found = requests_.find(handle);
    if (found == requests_.end() || !found->second.failure.ok()) return;
    Request& request = found->second;
    if (!add_range(request.sent[ready.layer], {ready.start, ready.stop})) {
      fail(request,
           Status::error(Code::kInvalid, "tokens " + range_text(ready.start, ready.stop) + " of layer " +
                                             std::to_string(ready.layer) + " overlap tokens that were sent before"));
      return;
    }
    request.ready.push_back(ready);
    for (auto& lane : request.lanes) queue(lane);
  });
}

void Sender::abort(std::uint64_t handle, std::string reason) {
  post([this, handle, reason = std::move(reason)] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) fail(found->second, Status::error(Code::kAborted, reason));
  });
}

bool Sender::step(std::uint64_t now) {
  bool moved = false;
  for (auto at = transfers_.begin(); at != transfers_.end();) {
    if (advance(**at)) {
      at = transfers_.erase(at);
      moved = true;
    } else {
      ++at;
    }
  }
  unready_ = false;
  for (auto& [id, owned] : links_) {
    if (owned->up()) moved |= feed(*owned);
  }
  moved |= sweep(now);
  stats_.open_requests = requests_.size();
  stats_.pending_tickets = pending_.size();
  return moved;
}

void Sender::queue(Lane& lane) {
  if (lane.queued || lane.cancelled || lane.remaining == 0) return;
  lane.queued = true;
  windows_[lane.link->id].queue.push_back(&lane);
}

void Sender::unqueue(Lane& lane) {
  if (!lane.queued) return;
  lane.queued = false;
  auto& queue = windows_[lane.link->id].queue;
  queue.erase(std::find(queue.begin(), queue.end(), &lane));
}

// Layers are ready and wait for a slot, which the receiver gives back in less time than it takes to sleep and wake.
bool Sender::expecting() const {
  return std::any_of(windows_.begin(), windows_.end(), [](const auto& at) { return !at.second.queue.empty(); });
}

// Starts frames while the link has work, slots and, where it needs them, staging buffers. Lanes take turns.
bool Sender::feed(Link& link) {
  LinkWindows& windows = windows_[link.id];
  bool moved = false;
  std::size_t unready = 0;  // lanes in a row whose next layer is still being computed
  while (unready < windows.queue.size() && link.up()) {
    Lane& lane = *windows.queue.front();
    wire::TokenRange tokens;
    if (!find_ready(lane, &tokens)) {
      lane.queued = false;
      windows.queue.pop_front();
      continue;
    }
    auto transfer = std::make_unique<Transfer>();
    if (!may_start(lane, &transfer->ahead)) {
      windows.queue.pop_front();
      windows.queue.push_back(&lane);
      ++unready;
      continue;
    }
    if (windows.free.empty()) {
      if (windows.released) {
        windows.released = false;
        wire::Prelude prelude;
        prelude.type = wire::Type::kWant;
        send(link, prelude);
      }
      break;
    }
    const PeerWindow& window = *windows.slots[windows.free.back()].memory;
    transfer->direct = window.local() != 0;
    if (!transfer->direct || (config_.copy_engine && window.path() == Path::kDevice)) {
      const Status status = take_staging(window.where(), transfer.get());
      if (!status.ok() && !transfer->direct) {  // where it is direct, the pack can store across without staging
        lose(link, status);
        return true;
      }
      if (status.ok() && transfer->staging == nullptr) break;
    }
    windows.queue.pop_front();
    windows.queue.push_back(&lane);
    launch(link, lane, tokens, std::move(transfer));
    unready = 0;
    moved = true;
  }
  if (windows.recalled && windows.queue.empty() && !windows.free.empty() && link.up()) release(link);
  return moved;
}

// Whether the lane's next layer is computed, or its pack may wait for that in a stream.
bool Sender::may_start(Lane& lane, bool* ahead) {
  After& after = lane.request->ready[lane.ready].after;
  if (after != nullptr && after->happened()) after.reset();
  *ahead = after != nullptr;
  if (*ahead) unready_ = true;
  return !*ahead || ahead_ < std::min(kMostAhead, config_.staging_slots - 1);  // a buffer is left to those that run
}

// Takes a slot, and packs into it or into the transfer's staging buffer. The lane may be gone when this returns.
void Sender::launch(Link& link, Lane& lane, wire::TokenRange tokens, std::unique_ptr<Transfer> transfer) {
  LinkWindows& windows = windows_[link.id];
  const std::uint32_t slot = windows.free.back();
  windows.free.pop_back();
  const Window& window = windows.slots[slot];
  const bool staged = transfer->staging != nullptr;
  next_frame(lane, tokens, staged ? std::min(window.memory->bytes(), config_.slot_bytes) : window.memory->bytes(),
             transfer.get());
  transfer->slot = slot;
  transfer->frame.slot = slot;
  transfer->frame.generation = window.generation;
  wire::Prelude prelude;
  prelude.request = lane.request->id;
  prelude.epoch = lane.epoch;
  RemapTask& task = transfer->task;
  task.blocks = lane.request->blocks[transfer->plan->group];
  task.after = lane.request->ready[lane.ready].after;
  task.seed = wire::checksum_seed(prelude, transfer->frame);
  plan_jobs(*transfer->plan, transfer->frame.token_start, transfer->frame.token_stop,
            staged ? transfer->staging->local() : window.memory->local(), true, &task);
  if (staged && transfer->direct) {
    task.copy_to = window.memory->local();
    task.copy_from = transfer->staging->local();
    task.copy_bytes = transfer->frame.payload_length;
  }
  if (transfer->ahead) ++ahead_;
  ++lane.in_flight;
  ++lane.request->packing;
  transfers_.push_back(std::move(transfer));
  mover_->submit(&task);
  if (advance(*transfers_.back())) transfers_.pop_back();
}

// Gives the transfer a buffer that UCX can put from into such a window; none where all are in use.
Status Sender::take_staging(Where window, Transfer* transfer) {
  const Where where = staging_for(*worker_, device_.get(), window, transfer->direct);
  auto& unused = staging_[static_cast<int>(where)];
  int& made = staging_made_[static_cast<int>(where)];
  if (unused.empty() && made < config_.staging_slots) {
    std::unique_ptr<OwnWindow> memory;
    auto status = OwnWindow::make(*worker_, device_, where, config_.slot_bytes, &memory);
    if (!status.ok()) return made == 0 ? status : Status{};  // fewer than configured will do
    unused.push_back(std::move(memory));
    ++made;
  }
  if (unused.empty()) return {};
  transfer->staging = std::move(unused.back());
  unused.pop_back();
  return {};
}

// Moves the lane's cursor to the next tokens that are ready and wanted.
bool Sender::find_ready(Lane& lane, wire::TokenRange* tokens) {
  const auto& plans = lane.link->config.plans;
  const auto& ready = lane.request->ready;
  for (; lane.ready < ready.size(); ++lane.ready, lane.plan = 0, lane.token = 0) {
    const Ready& item = ready[lane.ready];
    lane.plan = std::max(lane.plan, lane.link->first_plan(item.layer));
    for (; lane.plan < plans.size() && plans[lane.plan].layer == item.layer; ++lane.plan, lane.token = 0) {
      const wire::TokenRange& want = lane.want[plans[lane.plan].group];
      tokens->start = std::max({item.start, want.start, lane.token});
      tokens->stop = std::min(item.stop, want.stop);
      if (tokens->start < tokens->stop) return true;
    }
  }
  return false;
}

// Cuts the next frame off `tokens`, as many as fit, and moves the lane's cursor behind it.
void Sender::next_frame(Lane& lane, wire::TokenRange tokens, std::size_t slot_bytes, Transfer* transfer) {
  const LayerPlan& plan = lane.link->config.plans[lane.plan];
  // One token fits: add_link and on_grant have seen to it.
  std::uint64_t stop = std::min(tokens.stop, tokens.start + std::max<std::uint64_t>(plan.tokens_in(slot_bytes), 1));
  const std::uint64_t aligned = stop / kTokenAlignment * kTokenAlignment;
  if (stop < tokens.stop && aligned > tokens.start) stop = aligned;
  lane.token = stop;
  wire::Frame& frame = transfer->frame;
  frame.group = plan.group;
  frame.layer = plan.layer;
  frame.head_start = plan.head_start;
  frame.head_stop = plan.head_stop;
  frame.token_start = tokens.start;
  frame.token_stop = stop;
  for (std::size_t i = 0; i < plan.segments.size(); ++i) {
    frame.segments = static_cast<std::uint16_t>(frame.segments | (1u << i));
    frame.dtypes[i] = static_cast<std::uint8_t>(plan.segments[i].wire_dtype);
    frame.channels[i] = static_cast<std::uint32_t>(plan.segments[i].channels);
  }
  frame.scale_encoding = plan.scale_encoding;
  frame.payload_length = plan.payload_bytes(stop - tokens.start);
  transfer->lane = &lane;
  transfer->plan = &plan;
}

bool Sender::advance(Transfer& transfer) {
  Lane& lane = *transfer.lane;
  Link& link = *lane.link;
  if (transfer.stage == Stage::kPacking) {
    mover_->poll(&transfer.task);
    if (!transfer.task.done) return false;
    on_packed(transfer);
    transfer.stage = Stage::kPutting;
    if (!lane.cancelled && link.up() && !transfer.direct) {
      const auto* source = reinterpret_cast<const void*>(transfer.staging->address());
      link.endpoint->put(source, transfer.frame.payload_length, windows_[link.id].slots[transfer.slot].memory->remote(),
                         0, &transfer.put);
      link.endpoint->flush(&transfer.flush);
    }
  }
  if (!transfer.put.done || !transfer.flush.done) return false;
  if (transfer.staging != nullptr) {
    staging_[static_cast<int>(transfer.staging->where())].push_back(std::move(transfer.staging));
  }
  --lane.in_flight;
  if (link.up()) {
    const transport::Op& op = transfer.put.status != UCS_OK ? transfer.put : transfer.flush;
    if (op.status != UCS_OK) {
      lose(link, Status::error(Code::kTransport, std::string("UCX put: ") + ucs_status_string(op.status)));
    } else if (lane.cancelled) {
      windows_[link.id].free.push_back(transfer.slot);
      release_idle(link);
    } else {
      commit(transfer);
    }
  }
  conclude(*lane.request);
  return true;
}

void Sender::on_packed(Transfer& transfer) {
  Lane& lane = *transfer.lane;
  const wire::Frame& frame = transfer.frame;
  lane.remaining -= frame.token_stop - frame.token_start;
  --lane.request->packing;
  if (transfer.ahead) --ahead_;
  stats_.saturated += transfer.task.result.saturated;
  trace_.add({SpanKind::kPack, lane.request->handle, frame.layer, transfer.task.start_ns, transfer.task.stop_ns,
              frame.payload_length});
  if (lane.remaining == 0 && !lane.cancelled) {
    unqueue(lane);
    --windows_[lane.link->id].open;
  }
  if (!transfer.task.status.ok()) fail(*lane.request, transfer.task.status);
}

void Sender::commit(Transfer& transfer) {
  Lane& lane = *transfer.lane;
  transfer.frame.checksum = transfer.task.result.checksum;
  transfer.frame.saturated = transfer.task.result.saturated;
  wire::Prelude prelude;
  prelude.type = wire::Type::kFrame;
  prelude.request = lane.request->id;
  prelude.epoch = lane.epoch;
  std::atomic_thread_fence(std::memory_order_seq_cst);  // what was stored into the peer's window, before the message
  send(*lane.link, prelude, transfer.frame);
  Window& window = windows_[lane.link->id].slots[transfer.slot];
  window.granted = false;
  ++lane.frames;
  lane.bytes += transfer.frame.payload_length;
  ++stats_.frames;
  stats_.payload_bytes += transfer.frame.payload_length;
  if (transfer.direct) ++stats_.direct_frames;
  if (transfer.direct && window.memory->path() == Path::kDevice) ++stats_.peer_frames;
  trace_.add({SpanKind::kWire, lane.request->handle, transfer.frame.layer, transfer.task.stop_ns, now_ns(),
              transfer.frame.payload_length});
  release_idle(*lane.link);
}

}  // namespace hetkv::engine
