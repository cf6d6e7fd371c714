#include "engine/receiver.h"

#include <algorithm>
#include <atomic>

#include "engine/ranges.h"

namespace hetkv::engine {

Receiver::Receiver(const EngineConfig& config, Parts parts)
    : Engine(config, std::move(parts)),
      slots_(config.slot_bytes, config.window_bytes, device_, config.isolate_peers),
      gates_(device_ ? std::make_unique<StreamGates>(device_) : nullptr),
      // Epochs rise over restarts too, so that frames for an earlier life of this receiver are stale.
      next_epoch_(clock_->wall_ns()) {}

Receiver::~Receiver() {
  stop();
}

Status Receiver::start(bool threaded) {
  if (auto status = Engine::start(threaded); !status.ok() || device_ == nullptr) return status;
  auto status = Status::error(Code::kClosed, "the receiver's progress thread has ended");
  call([&] {
    status = slots_.reserve(*transport_, Where::kDevice);
    if (status.ok() && config_.verify_bytes > 0) {
      status = DeviceBuffer::device(device_, config_.verify_bytes, &device_scratch_);
    }
  });
  if (!status.ok()) stop();
  return status;
}

Status Receiver::receive(Intake intake, std::shared_ptr<Outcome>* out) {
  const auto outcome = outcomes_.open(intake.id);
  if (outcome == nullptr) return Status::error(Code::kInvalid, "a request with this id is under way already");
  *out = outcome;
  const bool posted = post([this, outcome, intake = std::move(intake)]() mutable {
    const std::uint64_t handle = outcome->handle;
    for (const auto id : intake.links) {
      const auto at = link(id);
      if (at == nullptr || !at->up()) {
        return tell_end(*outcome, Status::error(Code::kPeerLost, (at ? at->config.name : std::string("a peer")) +
                                                                     ": the link is not up"));
      }
    }
    Request& request = requests_[handle];
    request.outcome = outcome;
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
      rank(id);
      part.seen.resize(part.link->config.plans.size());
      for (const auto& plan : part.link->config.plans) {
        if (plan.layer >= request.missing.size()) request.missing.resize(plan.layer + 1, kAbsent);
        std::uint64_t& missing = request.missing[plan.layer];
        if (missing == kAbsent) missing = 0;
        missing += request.want[plan.group].stop - request.want[plan.group].start;
      }
      send(*part.link, prelude, wire::Ticket{intake.lease_ms, intake.content, request.want});
    }
    for (std::size_t layer = 0; layer < request.missing.size(); ++layer) {
      if (request.missing[layer] == 0) tell_layer(*outcome, static_cast<std::uint32_t>(layer));
    }
    slots_moved_ = true;
    grant();
    complete(request);  // where nothing is wanted
  });
  if (posted) return {};
  outcomes_.forget(**out);
  return Status::error(Code::kClosed, "the receiver's progress thread has ended");
}

Status Receiver::wait_stream(Outcome& outcome, std::int32_t layer, void* stream) {
  if (!gates_) return Status::error(Code::kInvalid, "the pool is in host memory: no stream has to wait for it");
  return gates_->wait(outcome, layer, stream);
}

// What an RDMA device has put into a GPU's memory is visible to kernels only after a flush, on devices that say so.
void Receiver::flush_rdma() {
  if (device_->can(kHetkvCapRdmaFlush) && !device_->can(kHetkvCapRdmaOrdered)) {
    static_cast<void>(device_->backend().flush_rdma_writes(device_->index()));
  }
}

void Receiver::on_arrived(const Outcome& outcome, std::int32_t layer) {
  if (!gates_) return;
  if (layer >= 0) gates_->arrived(outcome, layer);
  if (layer < 0) gates_->close(outcome);
}

void Receiver::abort(std::uint64_t handle, std::string reason) {
  post([this, handle, reason = std::move(reason)] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) fail(found->second, Status::error(Code::kAborted, reason));
  });
}

void Receiver::retire_link(std::uint32_t id) {
  post([this, id] {
    const auto at = link(id);
    if (at == nullptr) return retire(id);
    at->retired = true;  // memory goes once nothing can write to it: after the endpoint's close
    lose(*at, Status::error(Code::kPeerLost, "the peer's process has ended"), false);
  });
}

void Receiver::retire(std::uint32_t id) {
  slots_.retire(id);
  stats_.quarantined_slots = slots_.quarantined();
  slots_moved_ = true;
}

std::uint64_t Receiver::epoch(std::uint64_t handle) {
  std::uint64_t epoch = 0;
  call([&] {
    const auto found = requests_.find(handle);
    if (found != requests_.end()) epoch = found->second.epoch;
  });
  return epoch;
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
