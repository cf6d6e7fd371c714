#include "engine/sender.h"

#include <algorithm>

namespace hetkv {
namespace {

constexpr std::uint64_t kMs = 1'000'000;
constexpr std::uint64_t kTokenAlignment = 64;  // frames start at multiples of it where they can: whole blocks, full vectors

std::string range(std::uint64_t start, std::uint64_t stop) {
  return "[" + std::to_string(start) + ", " + std::to_string(stop) + ")";
}

}  // namespace

Sender::Sender(const EngineConfig& config, std::unique_ptr<Mover> mover) : Engine(config), mover_(std::move(mover)) {}

Sender::~Sender() { stop(); }

std::uint64_t Sender::submit(Submission submission) {
  const std::uint64_t handle = next_handle_.fetch_add(1);
  post([this, handle, submission = std::move(submission)]() mutable {
    if (handles_.count(submission.id) != 0) {
      events_.push({EventKind::kFailed, handle, 0, -1,
                    Status::error(Code::kInvalid, "a request with this id is in progress already")});
      return;
    }
    Request& request = requests_[handle];
    request.handle = handle;
    request.id = submission.id;
    request.tokens = std::move(submission.tokens);
    for (auto& blocks : submission.blocks) {
      request.blocks.push_back(std::make_shared<const std::vector<std::int32_t>>(std::move(blocks)));
    }
    if (submission.hold_ms > 0) request.deadline_ns = now_ns() + submission.hold_ms * kMs;
    handles_[request.id] = handle;
    const auto waiting = pending_.equal_range(request.id);
    std::vector<PendingTicket> tickets;
    for (auto at = waiting.first; at != waiting.second; ++at) tickets.push_back(std::move(at->second));
    pending_.erase(waiting.first, waiting.second);
    for (auto& ticket : tickets) add_lane(request, *ticket.link, ticket.epoch, std::move(ticket.want));
  });
  return handle;
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

void Sender::send_layer(std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop) {
  post([this, handle, layer, start, stop] {
    const auto found = requests_.find(handle);
    if (found == requests_.end() || !found->second.failure.ok()) return;
    Request& request = found->second;
    for (const auto& item : request.ready) {
      if (item.layer == layer && start < item.stop && item.start < stop) {
        fail(request, Status::error(Code::kInvalid, "tokens " + range(start, stop) + " of layer " + std::to_string(layer) +
                                                        " overlap " + range(item.start, item.stop) + ", sent before"));
        return;
      }
    }
    request.ready.push_back({layer, start, stop});
  });
}

void Sender::abort(std::uint64_t handle, std::string reason) {
  post([this, handle, reason = std::move(reason)] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) fail(found->second, Status::error(Code::kAborted, reason));
  });
}

void Sender::add_lane(Request& request, Link& link, std::uint64_t epoch, std::vector<wire::TokenRange> want) {
  for (auto& lane : request.lanes) {
    if (lane.link == &link && !lane.delivered) cancel(lane);  // the receiver tries again under a new epoch
  }
  if (request.packed) {
    refuse(link, request.id, epoch, Status::error(Code::kProtocol, "the sender has given the request's blocks back"));
    return;
  }
  if (want.size() != request.tokens.size()) {
    fail(request, Status::error(Code::kProtocol, "the ticket has " + std::to_string(want.size()) + " cache groups, the request " +
                                                     std::to_string(request.tokens.size())));
    refuse(link, request.id, epoch, request.failure);
    return;
  }
  for (std::size_t group = 0; group < want.size(); ++group) {
    if (want[group].stop > request.tokens[group] && want[group].stop > want[group].start) {
      Status why = Status::error(Code::kProtocol, "the ticket asks for tokens " + range(want[group].start, want[group].stop) +
                                                      " of cache group " + std::to_string(group) + ", the request has " +
                                                      std::to_string(request.tokens[group]));
      refuse(link, request.id, epoch, why);
      fail(request, std::move(why));
      return;
    }
  }
  Lane& lane = request.lanes.emplace_back();
  lane.request = &request;
  lane.link = &link;
  lane.epoch = epoch;
  lane.remaining = link.plan_tokens(want);
  lane.want = std::move(want);
  if (lane.remaining > 0) windows_[link.id].lanes.push_back(&lane);
  check_packed(request);
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
  for (auto& [id, owned] : links_) {
    if (owned->up()) moved |= feed(*owned);
  }
  return sweep(now) || moved;
}

// Starts frames while the link has work, slots and, where it needs them, staging buffers. Lanes take turns.
bool Sender::feed(Link& link) {
  LinkWindows& windows = windows_[link.id];
  bool moved = false;
  for (std::size_t tried = 0; tried < windows.lanes.size();) {
    Lane& lane = *windows.lanes[windows.turn++ % windows.lanes.size()];
    wire::TokenRange tokens;
    if (!find_ready(lane, &tokens)) {
      ++tried;
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
    const std::uint32_t slot = windows.free.back();
    ucx::RemoteMemory& memory = *windows.slots[slot].memory;
    auto transfer = std::make_unique<Transfer>();
    if (!(config_.direct && memory.local != 0) && !take_staging(transfer.get())) break;
    next_frame(lane, tokens, std::min(memory.bytes, config_.slot_bytes), transfer.get());
    tried = 0;
    windows.free.pop_back();
    transfer->slot = slot;
    transfer->frame.slot = slot;
    transfer->frame.generation = windows.slots[slot].generation;
    const std::uint64_t payload = transfer->staging >= 0 ? staging_[transfer->staging]->address() : memory.local;
    wire::Prelude prelude;
    prelude.request = lane.request->id;
    prelude.epoch = lane.epoch;
    RemapTask& task = transfer->task;
    task.blocks = lane.request->blocks[transfer->plan->group];
    task.seed = wire::checksum_seed(prelude, transfer->frame);
    plan_jobs(*transfer->plan, transfer->frame.token_start, transfer->frame.token_stop, payload, true, &task);
    ++lane.in_flight;
    ++lane.request->packing;
    mover_->submit(&task);
    transfers_.push_back(std::move(transfer));
    moved = true;
    if (advance(*transfers_.back())) transfers_.pop_back();
  }
  return moved;
}

bool Sender::take_staging(Transfer* transfer) {
  if (staging_.empty()) {
    for (int i = 0; i < config_.staging_slots; ++i) {
      std::unique_ptr<ucx::Memory> memory;
      if (!ucx::Memory::allocate(*worker_, config_.slot_bytes, &memory).ok()) break;
      free_staging_.push_back(static_cast<int>(staging_.size()));
      staging_.push_back(std::move(memory));
    }
  }
  if (free_staging_.empty()) return false;
  transfer->staging = free_staging_.back();
  free_staging_.pop_back();
  return true;
}

// Moves the lane's cursor to the next tokens that are ready and wanted.
bool Sender::find_ready(Lane& lane, wire::TokenRange* tokens) {
  const auto& plans = lane.link->config.plans;
  const auto& ready = lane.request->ready;
  for (; lane.ready < ready.size(); ++lane.ready, lane.plan = 0, lane.token = 0) {
    const Ready& item = ready[lane.ready];
    for (; lane.plan < plans.size(); ++lane.plan, lane.token = 0) {
      if (plans[lane.plan].layer != item.layer) continue;
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
  const std::uint64_t fit = (slot_bytes - 8 * plan.segments.size()) / plan.payload_bytes(1);
  std::uint64_t stop = std::min(tokens.stop, tokens.start + std::max<std::uint64_t>(fit, 1));
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
    if (!lane.cancelled && link.up() && transfer.staging >= 0) {
      const auto* source = reinterpret_cast<const void*>(staging_[transfer.staging]->address());
      link.endpoint->put(source, transfer.frame.payload_length, *windows_[link.id].slots[transfer.slot].memory, 0, &transfer.put);
      link.endpoint->flush(&transfer.flush);
    }
  }
  if (!transfer.put.done || !transfer.flush.done) return false;
  if (transfer.staging >= 0) free_staging_.push_back(transfer.staging);
  --lane.in_flight;
  ended_ = true;
  if (!link.up()) return true;
  for (const ucx::Op* op : {&transfer.put, &transfer.flush}) {
    if (op->status != UCS_OK) {
      lose(link, Status::error(Code::kTransport, std::string("UCX put: ") + ucs_status_string(op->status)));
      return true;
    }
  }
  if (lane.cancelled) {
    give_back(link, transfer.slot);
  } else {
    commit(transfer);
  }
  return true;
}

void Sender::on_packed(Transfer& transfer) {
  Lane& lane = *transfer.lane;
  const wire::Frame& frame = transfer.frame;
  lane.remaining -= frame.token_stop - frame.token_start;
  --lane.request->packing;
  stats_.saturated += transfer.task.result.saturated;
  trace_.add({SpanKind::kPack, lane.request->handle, frame.layer, transfer.task.start_ns, transfer.task.stop_ns, frame.payload_length});
  if (lane.remaining == 0) {
    auto& lanes = windows_[lane.link->id].lanes;
    lanes.erase(std::remove(lanes.begin(), lanes.end(), &lane), lanes.end());
  }
}

void Sender::commit(Transfer& transfer) {
  Lane& lane = *transfer.lane;
  transfer.frame.checksum = transfer.task.result.checksum;
  transfer.frame.saturated = transfer.task.result.saturated;
  wire::Prelude prelude;
  prelude.type = wire::Type::kFrame;
  prelude.request = lane.request->id;
  prelude.epoch = lane.epoch;
  send(*lane.link, prelude, transfer.frame);
  windows_[lane.link->id].slots[transfer.slot].granted = false;
  ++stats_.frames;
  stats_.payload_bytes += transfer.frame.payload_length;
  if (transfer.staging < 0) ++stats_.direct_frames;
  trace_.add({SpanKind::kWire, lane.request->handle, transfer.frame.layer, transfer.task.stop_ns, now_ns(), transfer.frame.payload_length});
  if (lane.remaining == 0) {
    release_idle(*lane.link);
    check_packed(*lane.request);
  }
}

}  // namespace hetkv
