// The receiver's frames: checked, unpacked, verified and counted.
#include <algorithm>
#include <atomic>
#include <utility>

#include "engine/ranges.h"
#include "engine/receiver.h"

namespace hetkv::engine {
namespace {

constexpr std::size_t kMostUnused = 8;

}  // namespace

// A frame alone is a bundle of one.
void Receiver::on_frame(Link& link, const wire::Prelude& prelude, const wire::Frame& frame) {
  on_bundle(link, {frame.slot, frame.generation, {{prelude.request, prelude.epoch, frame, 0}}});
}

// Each frame is judged alone; what is unpacked is unpacked together.
void Receiver::on_bundle(Link& link, const wire::Bundle& bundle) {
  Slot* slot = slots_.at(bundle.slot);
  const bool held = slot != nullptr && slot->state == SlotState::kGranted && slot->link == link.id &&
                    slot->generation == bundle.generation;
  auto unpack = make_unpack();
  unpack->slot = bundle.slot;
  unpack->pieces.reserve(bundle.records.size());
  unpack->task.reserve(bundle.records.size(), 2 * bundle.records.size());
  unpack->task.threads = link.config.threads;
  const wire::Record* before = nullptr;
  Request* request = nullptr;
  Part* part = nullptr;
  for (const wire::Record& record : bundle.records) {
    if (before == nullptr || record.epoch != before->epoch || record.request != before->request) {
      request = find(record.request, record.epoch);
      part = request != nullptr ? part_of(*request, link) : nullptr;
    }
    before = &record;
    // Of a request that has ended while the frame was under way, or that this peer was not asked for and cannot harm.
    if (part == nullptr || !request->failure.ok()) {
      ++stats_.stale_frames;
      continue;
    }
    if (!held) {
      fail(*request,
           Status::error(Code::kProtocol, link.config.name + ": a frame came in slot " + std::to_string(bundle.slot) +
                                              " generation " + std::to_string(bundle.generation) +
                                              ", which the sender does not hold"));
      continue;
    }
    Piece piece{request, part, nullptr, record};
    const Status status = admit(*request, *part, record, slot->memory->bytes(), &piece.plan);
    if (!status.ok()) {
      fail(*request, Status::error(status.code, link.config.name + ": " + status.detail));
      continue;
    }
    ++request->unpacking;
    add_frame(*piece.plan, request->blocks[piece.plan->group], record, slot->memory->local() + record.payload_offset,
              false, &unpack->task);
    unpack->pieces.push_back(std::move(piece));
  }
  if (!held) return;
  slots_moved_ = true;
  if (unpack->pieces.empty()) {
    keep(std::move(unpack));
    return give_back(bundle.slot);
  }
  slot->state = SlotState::kFilled;
  std::atomic_thread_fence(std::memory_order_acquire);  // the peer's stores came before its message
  if (link.config.rdma_windows) flush_rdma();
  unpacks_.push_front(std::move(unpack));
  unpacks_.front()->self = unpacks_.begin();
  submit(unpacks_.front()->task, *unpacks_.front());
  if (slots_moved_) grant();  // at once, so that the sender fills the slot while the next bundle is unpacked
}

void* Receiver::place(Link& link, wire::SlotName name, std::uint64_t offset, std::uint64_t bytes) {
  const Slot* slot = slots_.at(name.slot);
  const bool held = slot != nullptr && slot->state == SlotState::kGranted && slot->link == link.id &&
                    slot->generation == name.generation && slot->memory->where() == Where::kHost;
  if (!held || offset > slot->memory->bytes() || bytes > slot->memory->bytes() - offset) return nullptr;
  return reinterpret_cast<void*>(slot->memory->address() + offset);
}

std::unique_ptr<Receiver::Unpack> Receiver::make_unpack() {
  if (unused_.empty()) return std::make_unique<Unpack>();
  auto made = std::move(unused_.back());
  unused_.pop_back();
  return made;
}

// For the memory of its vectors.
void Receiver::keep(std::unique_ptr<Unpack> unpack) {
  if (unused_.size() >= kMostUnused) return;
  unpack->pieces.clear();
  for (RemapTask* task : {&unpack->task, &unpack->expected, &unpack->reread}) task->clear();
  unpack->holds_slot = true;
  unused_.push_back(std::move(unpack));
}

Receiver::Part* Receiver::part_of(Request& request, const Link& link) {
  const auto found = std::find_if(request.parts.begin(), request.parts.end(),
                                  [&](const Part& part) { return part.link.get() == &link; });
  return found != request.parts.end() ? &*found : nullptr;
}

// Everything that is written must have been asked for, on this link, once.
Status Receiver::admit(Request& request, Part& part, const wire::Record& record, std::size_t slot_bytes,
                       const LayerPlan** plan) {
  const wire::Frame& frame = record.frame;
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
      record.payload_offset + frame.payload_length > slot_bytes) {
    return wrong("has a payload of " + std::to_string(frame.payload_length) + " bytes at " +
                 std::to_string(record.payload_offset));
  }
  const auto index = static_cast<std::size_t>(*plan - part.link->config.plans.data());
  if (!part.seen[index].add({frame.token_start, frame.token_stop})) return wrong("came before");
  return {};
}

// The unpack has ended, and what it wrote was read again: its slot goes back, and its layers and requests count it.
void Receiver::finish(Unpack& unpack) {
  free_slot(unpack);
  for (std::size_t i = 0; i < unpack.pieces.size(); ++i) finish(unpack, i);
  auto owned = std::move(*unpack.self);
  unpacks_.erase(unpack.self);
  keep(std::move(owned));
}

void Receiver::free_slot(Unpack& unpack) {
  if (std::exchange(unpack.holds_slot, false)) {
    give_back(unpack.slot);
  }
}

void Receiver::finish(const Unpack& unpack, std::size_t at) {
  const Piece& piece = unpack.pieces[at];
  const remap::Result& result = unpack.task.frames[at].result;
  Request& request = *piece.request;
  Part& part = *piece.part;
  const wire::Frame& frame = piece.record.frame;
  --request.unpacking;
  trace_.add({SpanKind::kUnpack, request.handle, frame.layer, unpack.task.start_ns,
              std::max(unpack.task.stop_ns, unpack.reread.stop_ns), frame.payload_length});
  if (!request.failure.ok()) return;
  for (const RemapTask* task : {&unpack.task, &unpack.expected, &unpack.reread}) {
    if (!task->status.ok()) return fail(request, task->status);
  }
  const auto wrong = [&](Code code, const char* before, const char* after) {
    fail(request, Status::error(code, part.link->config.name + before + std::to_string(frame.layer) + ", tokens " +
                                          range_text(frame.token_start, frame.token_stop) + after));
  };
  if (result.checksum != frame.checksum) {
    return wrong(Code::kChecksum, ": the payload of layer ", " is not what was packed");
  }
  if (config_.verify_bytes > 0 && pool_differs(unpack, at)) {
    return wrong(Code::kPoolChecksum, ": the pool does not hold what was unpacked of layer ",
                 ": the unpack went wrong, or something else writes to the request's blocks");
  }
  ++stats_.frames;
  stats_.payload_bytes += frame.payload_length;
  stats_.saturated += frame.saturated + result.saturated;
  const std::uint64_t tokens = frame.token_stop - frame.token_start;
  ++part.frames;
  part.bytes += frame.payload_length;
  part.remaining -= tokens;
  std::uint64_t& missing = request.missing[frame.layer];
  missing -= tokens;
  if (missing == 0) tell_layer(*request.outcome, frame.layer);
  if (part.remaining > 0) return;
  close_part(part);
  complete(request);
}

// Tells the caller when all parts are complete, who waits for that, and then each sender whose part is. Erases the
// request where all are.
void Receiver::complete(Request& request) {
  if (!request.failure.ok()) return;
  const bool all =
      std::all_of(request.parts.begin(), request.parts.end(), [](const Part& part) { return part.remaining == 0; });
  if (all) tell_end(*request.outcome);
  for (auto& part : request.parts) {
    if (part.remaining > 0 || std::exchange(part.done, true) || !part.link->up()) continue;
    wire::Prelude prelude;
    prelude.type = wire::Type::kDone;
    prelude.request = request.id;
    prelude.epoch = request.epoch;
    send(*part.link, prelude, wire::Done{part.frames, part.bytes});
  }
  if (all) erase(request);
}

}  // namespace hetkv::engine
