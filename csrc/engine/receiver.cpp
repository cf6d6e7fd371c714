#include "engine/receiver.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "engine/ranges.h"

namespace hetkv::engine {

Receiver::Receiver(const EngineConfig& config, std::unique_ptr<Mover> mover, std::shared_ptr<Device> device)
    : Engine(config, std::move(mover), device),
      slots_(config.slot_bytes, config.window_bytes, device),
      gates_(device ? std::make_unique<StreamGates>(device) : nullptr),
      // Epochs rise over restarts too, so that frames for an earlier life of this receiver are stale.
      next_epoch_(static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())) {}

Receiver::~Receiver() {
  stop();
}

Status Receiver::start() {
  if (auto status = Engine::start(); !status.ok() || device_ == nullptr) return status;
  auto status = Status::error(Code::kClosed, "the receiver's progress thread has ended");
  call([&] { status = slots_.reserve(*worker_, Where::kDevice); });
  if (!status.ok()) stop();
  return status;
}

std::uint64_t Receiver::receive(Intake intake) {
  const std::uint64_t handle = next_handle_.fetch_add(1);
  if (gates_) gates_->open(handle);
  const bool posted = post([this, handle, intake = std::move(intake)]() mutable {
    const auto reject = [&](Status status) { tell(EventKind::kFailed, handle, -1, std::move(status)); };
    if (handles_.count(intake.id) != 0) {
      return reject(Status::error(Code::kInvalid, "a request with this id is in progress already"));
    }
    for (const auto id : intake.links) {
      const auto at = link(id);
      if (at == nullptr || !at->up()) {
        return reject(
            Status::error(Code::kPeerLost, (at ? at->config.name : std::string("a peer")) + ": the link is not up"));
      }
    }
    Request& request = requests_[handle];
    request.handle = handle;
    request.id = intake.id;
    request.epoch = ++next_epoch_;
    request.want = std::move(intake.want);
    for (auto& blocks : intake.blocks) {
      request.blocks.push_back(std::make_shared<const std::vector<std::int32_t>>(std::move(blocks)));
    }
    request.deadline_ns = now_ns() + intake.lease_ms * 1'000'000ull;
    handles_[request.id] = handle;
    deadlines_.emplace(request.deadline_ns, handle);
    wire::Prelude prelude;
    prelude.type = wire::Type::kTicket;
    prelude.request = request.id;
    prelude.epoch = request.epoch;
    for (const auto id : intake.links) {
      Part& part = request.parts.emplace_back();
      part.link = link(id);
      part.remaining = part.link->plan_tokens(request.want);
      Demand& demand = demands_[id];
      if (part.remaining > 0) ++demand.open;
      demand.hungry = true;
      part.seen.resize(part.link->config.plans.size());
      for (const auto& plan : part.link->config.plans) {
        request.layers[plan.layer] += request.want[plan.group].stop - request.want[plan.group].start;
      }
      send(*part.link, prelude, wire::Ticket{intake.lease_ms, intake.content, request.want});
    }
    for (const auto& [layer, missing] : request.layers) {
      if (missing == 0) tell(EventKind::kLayer, handle, static_cast<std::int32_t>(layer));
    }
    slots_moved_ = true;
    grant();
    complete(request);  // where nothing is wanted
  });
  if (!posted && gates_) gates_->close(handle);
  return posted ? handle : 0;
}

Status Receiver::wait_stream(std::uint64_t handle, std::int32_t layer, void* stream) {
  if (!gates_) return Status::error(Code::kInvalid, "the pool lies in host memory: no stream has to wait for it");
  return gates_->wait(handle, layer, stream);
}

// What an RDMA device has put into a GPU's memory is visible to kernels only after a flush, on devices that say so.
void Receiver::flush_rdma() {
  if (device_->can(kHetkvCapRdmaFlush) && !device_->can(kHetkvCapRdmaOrdered)) {
    static_cast<void>(device_->backend().flush_rdma_writes(device_->index()));
  }
}

// Tells Python, and the streams that wait.
void Receiver::tell(EventKind kind, std::uint64_t handle, std::int32_t layer, Status status) {
  if (gates_ && kind == EventKind::kLayer) gates_->arrived(handle, layer);
  if (gates_ && kind != EventKind::kLayer) gates_->close(handle);
  events_.push({kind, handle, 0, layer, std::move(status)});
}

void Receiver::abort(std::uint64_t handle, std::string reason) {
  post([this, handle, reason = std::move(reason)] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) fail(found->second, Status::error(Code::kAborted, reason));
  });
}

void Receiver::retire_link(std::uint32_t id) {
  post([this, id] {
    if (const auto at = link(id)) lose(*at, Status::error(Code::kPeerLost, "the peer's process has ended"), false);
    slots_.retire(id);
    stats_.quarantined_slots = slots_.quarantined();
    slots_moved_ = true;
  });
}

std::uint64_t Receiver::epoch(std::uint64_t handle) {
  std::uint64_t epoch = 0;
  call([&] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) epoch = found->second.epoch;
  });
  return epoch;
}

void Receiver::on_frame(Link& link, const wire::Prelude& prelude, const wire::Frame& frame) {
  Request* request = find(prelude.request, prelude.epoch);
  Part* part = nullptr;
  if (request != nullptr) {
    const auto found = std::find_if(request->parts.begin(), request->parts.end(),
                                    [&](const Part& at) { return at.link.get() == &link; });
    if (found != request->parts.end()) part = &*found;
  }
  // A request that has ended while the frame was under way, or that this peer was not asked for and cannot harm.
  const bool stale = part == nullptr || !request->failure.ok();
  if (stale) ++stats_.stale_frames;
  Slot* slot = slots_.at(frame.slot);
  if (slot == nullptr || slot->state != SlotState::kLent || slot->link != link.id ||
      slot->generation != frame.generation) {
    if (stale) return;
    return fail(*request, Status::error(Code::kProtocol, link.config.name + ": a frame came in slot " +
                                                             std::to_string(frame.slot) + " generation " +
                                                             std::to_string(frame.generation) +
                                                             ", which the sender does not hold"));
  }
  slot->state = SlotState::kFilled;
  slots_moved_ = true;
  if (stale) return slots_.free(frame.slot);
  auto unpack = std::make_unique<Unpack>();
  const Status status = admit(*request, *part, frame, &unpack->plan);
  if (!status.ok()) {
    slots_.free(frame.slot);
    return fail(*request, Status::error(status.code, link.config.name + ": " + status.detail));
  }
  unpack->request = request;
  unpack->part = part;
  unpack->frame = frame;
  RemapTask& task = unpack->task;
  task.blocks = request->blocks[unpack->plan->group];
  task.seed = wire::checksum_seed(prelude, frame);
  plan_jobs(*unpack->plan, frame.token_start, frame.token_stop, slot->memory->local(), false, &task);
  ++request->unpacking;
  std::atomic_thread_fence(std::memory_order_acquire);  // the peer's stores came before its message
  if (link.config.rdma_windows) flush_rdma();
  mover_->submit(&task);
  unpacks_.push_back(std::move(unpack));
  if (finish(*unpacks_.back())) unpacks_.pop_back();
  if (slots_moved_) grant();  // at once, so that the sender fills the slot while the next frame is unpacked
}

// Everything that is written must have been asked for, on this link, once.
Status Receiver::admit(Request& request, Part& part, const wire::Frame& frame, const LayerPlan** plan) {
  const auto wrong = [&](const std::string& what) {
    return Status::error(Code::kProtocol, "a frame of layer " + std::to_string(frame.layer) + ", heads " +
                                              range_text(frame.head_start, frame.head_stop) + ", tokens " +
                                              range_text(frame.token_start, frame.token_stop) + " " + what);
  };
  *plan = part.link->find(frame);
  if (*plan == nullptr) return wrong("is of no route of this link");
  const LayerPlan& wanted = **plan;
  if (frame.group != wanted.group) return wrong("names cache group " + std::to_string(frame.group));
  if (frame.segments != (1u << wanted.segments.size()) - 1u) return wrong("has other segments than the route");
  if (frame.scale_encoding != wanted.scale_encoding || frame.codec != 0) {
    return wrong("has a scale encoding or codec that was not agreed");
  }
  for (std::size_t i = 0; i < wanted.segments.size(); ++i) {
    if (frame.dtypes[i] != static_cast<std::uint8_t>(wanted.segments[i].wire_dtype) ||
        frame.channels[i] != static_cast<std::uint32_t>(wanted.segments[i].channels)) {
      return wrong("has another dtype or channel count than the route in segment " + std::to_string(i));
    }
  }
  const wire::TokenRange& want = request.want[wanted.group];
  if (frame.token_start < want.start || frame.token_stop > want.stop || frame.token_start >= frame.token_stop) {
    return wrong("is outside the ticket's tokens " + range_text(want.start, want.stop));
  }
  if (frame.payload_length != wanted.payload_bytes(frame.token_stop - frame.token_start) ||
      frame.payload_length > config_.slot_bytes) {
    return wrong("has a payload of " + std::to_string(frame.payload_length) + " bytes");
  }
  const auto index = static_cast<std::size_t>(*plan - part.link->config.plans.data());
  if (!add_range(part.seen[index], {frame.token_start, frame.token_stop})) return wrong("came before");
  return {};
}

// True: the unpack has ended, and its slot, its layer and its request have been told.
bool Receiver::finish(Unpack& unpack) {
  mover_->poll(&unpack.task);
  if (!unpack.task.done) return false;
  Request& request = *unpack.request;
  const wire::Frame& frame = unpack.frame;
  slots_.free(frame.slot);
  slots_moved_ = true;
  --request.unpacking;
  trace_.add({SpanKind::kUnpack, request.handle, frame.layer, unpack.task.start_ns, unpack.task.stop_ns,
              frame.payload_length});
  if (!request.failure.ok()) return true;
  if (!unpack.task.status.ok()) {
    fail(request, unpack.task.status);
    return true;
  }
  if (unpack.task.result.checksum != frame.checksum) {
    fail(request,
         Status::error(Code::kChecksum,
                       unpack.part->link->config.name + ": the payload of layer " + std::to_string(frame.layer) +
                           ", tokens " + range_text(frame.token_start, frame.token_stop) + " is not what was packed"));
    return true;
  }
  ++stats_.frames;
  stats_.payload_bytes += frame.payload_length;
  stats_.saturated += frame.saturated + unpack.task.result.saturated;
  const std::uint64_t tokens = frame.token_stop - frame.token_start;
  ++unpack.part->frames;
  unpack.part->bytes += frame.payload_length;
  unpack.part->remaining -= tokens;
  if (unpack.part->remaining == 0) close_part(*unpack.part);
  std::uint64_t& missing = request.layers[frame.layer];
  missing -= tokens;
  if (missing == 0) tell(EventKind::kLayer, request.handle, static_cast<std::int32_t>(frame.layer));
  complete(request);
  return true;
}

// Tells each sender whose part is complete, and the caller when all are. Erases the request then.
void Receiver::complete(Request& request) {
  if (!request.failure.ok()) return;
  bool all = true;
  for (auto& part : request.parts) {
    if (part.remaining > 0) {
      all = false;
    } else if (!part.done) {
      part.done = true;
      wire::Prelude prelude;
      prelude.type = wire::Type::kDone;
      prelude.request = request.id;
      prelude.epoch = request.epoch;
      if (part.link->up()) send(*part.link, prelude, wire::Done{part.frames, part.bytes});
    }
  }
  if (!all) return;
  tell(EventKind::kComplete, request.handle, -1);
  erase(request);
}

void Receiver::erase(Request& request) {
  deadlines_.erase({request.deadline_ns, request.handle});
  handles_.erase(request.id);
  requests_.erase(request.handle);
}

Receiver::Request* Receiver::find(const wire::RequestId& id, std::uint64_t epoch) {
  const auto found = handles_.find(id);
  if (found == handles_.end()) return nullptr;
  Request& request = requests_.at(found->second);
  return request.epoch == epoch ? &request : nullptr;
}

}  // namespace hetkv::engine
