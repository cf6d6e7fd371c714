// The sender's bundles: filled from the lanes of a link, packed, put where need be, and committed.
#include <algorithm>
#include <atomic>

#include "engine/sender.h"

namespace hetkv::engine {
namespace {

// Frames start at multiples of so many tokens where they can: whole blocks, full vectors.
constexpr std::uint64_t kTokenAlignment = 64;
// Bundles that may wait in a stream for the caller's work. They hold slots, so there are few.
constexpr int kMostAhead = 4;
// A link with so many bundles in flight is busy: what comes meanwhile is gathered until a slot is full.
constexpr std::size_t kBusy = 2;
constexpr std::uint64_t kSlowPutNs = 10'000'000;
// Below this the pack stores across instead of leaving it to a copy engine. An estimate, not measured.
constexpr std::size_t kCopyFrom = std::size_t{1} << 20;

// Bundles that are kept for their memory.
constexpr std::size_t kMostUnused = 8;

constexpr std::uint64_t aligned(std::uint64_t offset) {
  return (offset + wire::kPayloadAlignment - 1) / wire::kPayloadAlignment * wire::kPayloadAlignment;
}

}  // namespace

// Starts one bundle where the link has something to send, a slot, and, where it needs one, a staging buffer.
bool Sender::feed(Link& link) {
  WaitingLinks* waits = nullptr;
  const bool started = start_bundle(link, &waits);
  leave(link.id, waits);
  return started;
}

// `waits`: in which queue the link stands now.
bool Sender::start_bundle(Link& link, WaitingLinks** waits) {
  LinkWindows& windows = windows_[link.id];
  const bool ahead = windows.ready.empty();
  LaneQueue& lanes = ahead ? windows.ahead : windows.ready;
  if (lanes.empty()) {
    if (windows.recalled && !windows.free.empty()) release(link);
    return false;
  }
  if (ahead) {  // a buffer is left to others
    if (!take_turn(link, for_ahead_, room_ahead(), waits)) return false;
  }
  if (windows.free.empty()) {
    if (std::exchange(windows.released, false)) {
      wire::Prelude prelude;
      prelude.type = wire::Type::kWant;
      send(link, prelude);
    }
    return false;
  }
  const PeerWindow& window = *windows.slots[windows.free.back()].memory;
  const Work work = ready_work(lanes, window.bytes(), most_frames(link));
  const bool full = work.bytes >= window.bytes() || work.frames >= most_frames(link);
  if (!ahead && !full && windows.in_flight >= kBusy) return false;
  auto bundle = unused_.empty() ? std::make_unique<Bundle>() : std::move(unused_.back());
  if (!unused_.empty()) unused_.pop_back();
  bundle->link = this->link(link.id);
  bundle->ahead = ahead;
  bundle->direct = window.local() != 0;
  const bool copies = config_.copy_engine && window.path() == Path::kDevice && work.bytes >= kCopyFrom;
  if ((!bundle->direct || copies) && !take_staging(link, window.where(), bundle.get(), waits)) return false;
  const std::size_t staged = bundle->staging != nullptr ? config_.slot_bytes : window.bytes();
  fill(lanes, std::min(window.bytes(), staged), windows.turn, bundle.get());
  windows.turn = !windows.turn;
  launch(windows, std::move(bundle));
  return true;
}

std::size_t Sender::most_frames(const Link& link) const {
  return link.config.minor >= kBundlesSince ? static_cast<std::size_t>(config_.bundle_frames) : 1;
}

// What the lanes have to send, counted until it fills a bundle. It may count layers that are still being computed.
Sender::Work Sender::ready_work(const LaneQueue& lanes, std::size_t most_bytes, std::size_t most_frames) const {
  Work work;
  for (const auto& [priority, arrival, lane] : lanes.in_order()) {
    wire::TokenRange tokens;
    if (!lane->find_next(&tokens)) continue;
    const std::size_t layers = lane->request->ready.size() - lane->ready;
    work.frames += layers;
    work.bytes += layers * lane->link->config.plans[lane->plan].payload_bytes(tokens.stop - tokens.start);
    if (work.bytes >= most_bytes || work.frames >= most_frames) break;
  }
  return work;
}

// True: the link may take one of the `available`, as there is one for each that waits before it. False: it waits now.
bool Sender::take_turn(const Link& link, WaitingLinks& queue, std::size_t available, WaitingLinks** waits) {
  if (queue.before(link.id) < available) return true;
  queue.add(link.id);
  *waits = &queue;
  return false;
}

// The link waits in no queue but that one. What it waited for and did not take, those after it may: also where it
// started a bundle that needs none of it.
void Sender::leave(std::uint32_t link, const WaitingLinks* but) {
  for (WaitingLinks* queue : {&short_of_staging_[0], &short_of_staging_[1], &for_ahead_}) {
    if (queue == but || !queue->remove(link)) continue;
    awaken(*queue, queue == &for_ahead_ ? room_ahead() : available(static_cast<Where>(queue - short_of_staging_)));
  }
}

// Those of the queue for whom there is one of what they wait for.
void Sender::awaken(const WaitingLinks& queue, std::size_t available) {
  for (const std::uint32_t id : queue.in_order()) {
    if (available-- == 0) return;
    if (const auto waiting = link(id)) awaken(*waiting);
  }
}

std::size_t Sender::room_ahead() const {
  return static_cast<std::size_t>(std::max(std::min(kMostAhead, config_.staging_slots - 1) - ahead_, 0));
}

std::size_t Sender::available(Where where) const {
  const auto at = static_cast<int>(where);
  return staging_[at].size() + static_cast<std::size_t>(std::max(config_.staging_slots - staging_made_[at], 0));
}

// Gives the bundle a buffer that can be put from, or a device copies from, into such a window. False: it has to wait
// for one, or the link was lost. Where the window can be stored into, a lack of memory for buffers is no failure.
bool Sender::take_staging(Link& link, Where window, Bundle* bundle, WaitingLinks** waits) {
  LinkWindows& windows = windows_[link.id];
  if (windows.staged >= static_cast<std::size_t>(config_.staging_slots)) return false;  // its own puts give one back
  const Where where = staging_for(*transport_, device_.get(), window, bundle->direct);
  auto& unused = staging_[static_cast<int>(where)];
  int& made = staging_made_[static_cast<int>(where)];
  auto& queue = short_of_staging_[static_cast<int>(where)];
  if (!take_turn(link, queue, available(where), waits)) return false;
  if (unused.empty()) {
    std::unique_ptr<OwnWindow> memory;
    const auto status = OwnWindow::make(*transport_, device_, where, config_.slot_bytes, &memory);
    if (status.ok()) {
      unused.push_back(std::move(memory));
      ++made;
    } else if (made == 0) {
      if (!bundle->direct) lose(link, status);
      return bundle->direct;
    } else {
      return take_turn(link, queue, 0, waits);
    }
  }
  bundle->staging = std::move(unused.back());
  unused.pop_back();
  ++windows.staged;
  return true;
}

void Sender::give_back(Bundle& bundle) {
  if (bundle.staging == nullptr) return;
  --windows_[bundle.link->id].staged;
  const Where kind = bundle.staging->where();
  const auto where = static_cast<int>(kind);
  if (bundle.slow && ++staging_made_[where] > config_.staging_slots) {
    --staging_made_[where];
    bundle.staging.reset();
  } else {
    staging_[where].push_back(std::move(bundle.staging));
  }
  awaken(short_of_staging_[where], available(kind));
}

// A put to a peer that reads slowly, or not at all, must not keep the others from a buffer.
void Sender::notice_slow_puts(std::uint64_t now) {
  for (Bundle* bundle : putting_) {
    if (bundle->slow || now < bundle->put_ns + kSlowPutNs) continue;
    bundle->slow = true;
    const Where kind = bundle->staging->where();
    --staging_made_[static_cast<int>(kind)];
    awaken(short_of_staging_[static_cast<int>(kind)], available(kind));
  }
}

// Takes frames from the lanes, in their order, until `room` bytes are full. Those of lanes ahead are of one wave.
void Sender::fill(LaneQueue& lanes, std::size_t room, bool shortest, Bundle* bundle) {
  const std::size_t most = most_frames(*bundle->link);
  const Wave* wave = nullptr;
  for (bool full = false; !full && !lanes.empty();) {
    Lane& lane = shortest ? lanes.shortest() : lanes.first();
    wire::TokenRange tokens;
    static_cast<void>(lane.find_next(&tokens));
    const auto& sent = lane.request->ready;
    if (bundle->ahead) {
      const Wave* next = sent[lane.ready].wave.get();
      if (wave != nullptr && next != wave) break;
      if (wave == nullptr) bundle->task.after = next->after;
      wave = next;
    }
    unplace(lane);
    const auto belongs = [&] {
      const Wave* next = sent[lane.ready].wave.get();
      return bundle->ahead ? next == wave : next == nullptr || next->computed();
    };
    while (!full && lane.find_next(&tokens) && belongs()) {
      full = bundle->pieces.size() >= most || !cut(lane, tokens, room, bundle);
    }
    place(lane);
  }
}

// Cuts the lane's next frame off `tokens`, as many as fit after what the bundle holds, and moves the cursor past it.
// False: too few fit.
bool Sender::cut(Lane& lane, wire::TokenRange tokens, std::size_t room, Bundle* bundle) {
  const LayerPlan& plan = lane.link->config.plans[lane.plan];
  const std::uint64_t offset = aligned(bundle->bytes);
  std::uint64_t stop = tokens.stop;
  if (offset + plan.payload_bytes(stop - tokens.start) > room) {
    const std::uint64_t fits = offset < room ? plan.tokens_in(room - offset) : 0;
    if (!bundle->pieces.empty() && fits < kTokenAlignment) return false;
    // One token fits into an empty slot: add_link and on_grant have seen to it.
    stop = std::min(stop, tokens.start + std::max<std::uint64_t>(fits, 1));
    const std::uint64_t whole = stop / kTokenAlignment * kTokenAlignment;
    if (stop < tokens.stop && whole > tokens.start) stop = whole;
  }
  lane.token = stop;
  lane.unsent -= stop - tokens.start;
  ++lane.in_flight;
  ++lane.request->packing;
  Piece& piece = bundle->pieces.emplace_back();
  piece.lane = &lane;
  piece.plan = &plan;
  piece.record.request = lane.request->id;
  piece.record.epoch = lane.epoch;
  piece.record.payload_offset = offset;
  piece.record.frame = frame_of(plan, {tokens.start, stop});
  bundle->bytes = offset + piece.record.frame.payload_length;
  return true;
}

// Takes a slot, and packs into it or into the bundle's staging buffer. The lanes may be gone when this returns.
void Sender::launch(LinkWindows& windows, std::unique_ptr<Bundle> owned) {
  Bundle& bundle = *owned;
  bundle.slot = windows.free.back();
  windows.free.pop_back();
  const std::uint64_t window = windows.slots[bundle.slot].memory->local();
  const bool staged = bundle.staging != nullptr;
  RemapTask& task = bundle.task;
  task.owner = &bundle;
  task.threads = bundle.link->config.threads;
  task.reserve(bundle.pieces.size(), 2 * bundle.pieces.size());
  for (const Piece& piece : bundle.pieces) {
    const wire::Record& record = piece.record;
    const std::uint64_t payload = (staged ? bundle.staging->local() : window) + record.payload_offset;
    add_frame(*piece.plan, piece.lane->request->blocks[piece.plan->group], record, payload, true, &task);
  }
  if (staged && bundle.direct) {
    task.copy_to = window;
    task.copy_from = bundle.staging->local();
    task.copy_bytes = bundle.bytes;
  }
  if (bundle.ahead) {
    ++ahead_;
  } else {
    ++windows.in_flight;
  }
  bundles_.push_front(std::move(owned));
  bundle.self = bundles_.begin();
  mover_->submit(&task);
  if (task.done) on_packed(bundle);
}

void Sender::on_packed(Bundle& bundle) {
  LinkWindows& windows = windows_[bundle.link->id];
  if (bundle.ahead) {
    --ahead_;
    awaken(for_ahead_, 1);
  }
  bool wanted = false;
  for (std::size_t i = 0; i < bundle.pieces.size(); ++i) {
    Piece& piece = bundle.pieces[i];
    Lane& lane = *piece.lane;
    wire::Frame& frame = piece.record.frame;
    const remap::Result& result = bundle.task.frames[i].result;
    frame.checksum = result.checksum;
    frame.saturated = result.saturated;
    lane.remaining -= frame.token_stop - frame.token_start;
    --lane.request->packing;
    stats_.saturated += result.saturated;
    trace_.add({SpanKind::kPack, lane.request->handle, frame.layer, bundle.task.start_ns, bundle.task.stop_ns,
                frame.payload_length});
    if (lane.remaining == 0 && !lane.cancelled) --windows.open;
    if (!bundle.task.status.ok()) fail(*lane.request, bundle.task.status);
    wanted |= !lane.cancelled;
  }
  if (!wanted || bundle.direct || !bundle.link->up()) return end(bundle);
  const auto* source = reinterpret_cast<const void*>(bundle.staging->address());
  bundle.put_ns = now_ns();
  bundle.link->endpoint->put(source, bundle.bytes, windows.slots[bundle.slot].memory->remote(), &bundle.put);
  putting_.push_back(&bundle);
}

bool Sender::advance_puts() {
  bool moved = false;
  for (std::size_t i = 0; i < putting_.size();) {
    Bundle& bundle = *putting_[i];
    if (!bundle.put.done) {
      ++i;
      continue;
    }
    putting_.erase(putting_.begin() + static_cast<std::ptrdiff_t>(i));
    moved = true;
    if (!bundle.put.status.ok() && bundle.link->up()) lose(*bundle.link, bundle.put.status);
    end(bundle);
  }
  return moved;
}

// Nothing of the bundle is in flight any more: commits it, and gives back what it held.
void Sender::end(Bundle& bundle) {
  const auto link = bundle.link;
  LinkWindows& windows = windows_[link->id];
  give_back(bundle);
  if (!bundle.ahead) --windows.in_flight;
  awaken(*link);
  if (link->up()) commit(bundle);
  for (std::size_t i = 0; i < bundle.pieces.size(); ++i) {
    Lane& lane = *bundle.pieces[i].lane;
    --lane.in_flight;
    const bool last = i + 1 == bundle.pieces.size() || bundle.pieces[i + 1].lane != &lane;
    if (last) conclude(*lane.request);
  }
  auto owned = std::move(*bundle.self);
  bundles_.erase(bundle.self);
  if (unused_.size() >= kMostUnused) return;
  owned->clear();
  unused_.push_back(std::move(owned));
}

// Tells the receiver of the frames whose requests still go on; where there are none the slot is unused.
void Sender::commit(Bundle& bundle) {
  const Link& link = *bundle.link;
  Window& window = windows_[link.id].slots[bundle.slot];
  wire::Bundle body{bundle.slot, window.generation, {}};
  body.records.reserve(bundle.pieces.size());
  const std::uint64_t now = now_ns();
  for (const Piece& piece : bundle.pieces) {
    Lane& lane = *piece.lane;
    if (lane.cancelled) continue;
    const wire::Frame& frame = piece.record.frame;
    ++lane.frames;
    lane.bytes += frame.payload_length;
    body.records.push_back(piece.record);
    ++stats_.frames;
    stats_.payload_bytes += frame.payload_length;
    if (bundle.direct) ++stats_.direct_frames;
    if (bundle.direct && window.memory->path() == Path::kDevice) ++stats_.device_frames;
    trace_.add({SpanKind::kWire, lane.request->handle, frame.layer, bundle.task.stop_ns, now, frame.payload_length});
  }
  if (body.records.empty()) {
    windows_[link.id].free.push_back(bundle.slot);
  } else {
    std::atomic_thread_fence(std::memory_order_seq_cst);  // what was stored into the window, before the message
    window.granted = false;
    ++stats_.bundles;
    send_commit(*bundle.link, std::move(body));
  }
  release_idle(*bundle.link);
}

// A bundle of one is a frame.
void Sender::send_commit(Link& link, wire::Bundle body) {
  wire::Prelude prelude;
  prelude.type = wire::Type::kBundle;
  if (body.records.size() > 1 || body.records.front().payload_offset != 0) return send(link, prelude, body);
  wire::Record& record = body.records.front();
  prelude.type = wire::Type::kFrame;
  prelude.request = record.request;
  prelude.epoch = record.epoch;
  record.frame.slot = body.slot;
  record.frame.generation = body.generation;
  send(link, prelude, record.frame);
}

}  // namespace hetkv::engine
