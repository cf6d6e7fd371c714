#include "transport/streams.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "transport/link_coder.h"
#include "transport/memory_key.h"
#include "transport/shared_memory.h"
#include "transport/stream.h"

namespace hetkv::transport {
namespace {

constexpr std::size_t kPartBytes = kMostSealed;             // of a put, between which messages and other streams come
constexpr std::size_t kCodedPartBytes = 64 * 1024;          // where parts are coded: some 0.1 ms of work
constexpr std::size_t kMostQueued = std::size_t{64} << 20;  // of messages that a peer does not read
constexpr std::uint64_t kMostAhead = 1 << 20;               // parts that came before an earlier one
constexpr std::uint64_t kShutNs = 100'000'000;              // how long the peer has to end its side

// Memory that is shared by descriptor, and registered for RDMA where a peer asks for that.
class HostMemory final : public Memory {
 public:
  explicit HostMemory(std::unique_ptr<SharedMemory> made) : shared(std::move(made)) {
    address_ = shared->address();
    bytes_ = shared->bytes();
  }
  std::shared_ptr<const void> backing() const override { return shared; }
  const std::shared_ptr<const SharedMemory> shared;
  mutable std::unique_ptr<RmaMemory> rma;
};

// Memory of the caller's, for RDMA alone.
class AttachedMemory final : public Memory {
 public:
  AttachedMemory(std::uint64_t address, std::size_t bytes, std::unique_ptr<RmaMemory> made) : rma(std::move(made)) {
    address_ = address;
    bytes_ = bytes;
  }
  const std::unique_ptr<RmaMemory> rma;
};

class StreamPeerMemory final : public PeerMemory {
 public:
  StreamPeerMemory(wire::SlotName name, std::unique_ptr<Mapping> mapped, std::unique_ptr<RmaTarget> opened)
      : slot(name), target(std::move(opened)), mapping_(std::move(mapped)) {
    local_ = mapping_ ? mapping_->address() : 0;
    rma_ = target != nullptr;
  }
  std::shared_ptr<const void> backing() const override { return mapping_; }
  const wire::SlotName slot;
  const std::unique_ptr<RmaTarget> target;

 private:
  const std::shared_ptr<const Mapping> mapping_;
};

}  // namespace

class StreamEndpoint final : public Endpoint, public StreamOwner {
 public:
  StreamEndpoint(StreamTransport& transport, std::uint64_t link) : transport_(transport), link_(link) {}
  ~StreamEndpoint() override {
    for (auto& stream : streams_) transport_.forget(*stream);
    for (const auto& [slot, window] : windows_) ::close(window.descriptor);
  }

  Status start(const PeerAddress& peer) {
    if (peer.coding.values != codec::Values::kNone) coder_.emplace(peer.coding, *transport_.clock_);
    for (const auto& config : peer.streams) {
      if (config.cipher != Cipher::kNone && !has_cipher(config.cipher)) {
        return Status::error(Code::kUnsupported, "this build or CPU does not have the link's cipher");
      }
      // The transport's own descriptors, so that those of the caller stay his, whatever happens.
      const int own = fcntl(config.descriptor, F_DUPFD_CLOEXEC, 0);
      if (own < 0)
        return Status::error(Code::kTransport, std::string("no descriptor is left: ") + std::strerror(errno));
      streams_.push_back(std::make_unique<Stream>(*this, own, config, streams_.empty(), peer.coding.accept));
      if (auto status = transport_.watch(*this, *streams_.back()); !status.ok()) return status;
    }
    if (streams_.empty()) return Status::error(Code::kInvalid, "a link needs a stream");
    if (transport_.rma_ != nullptr && !peer.address.empty()) {
      static_cast<void>(transport_.rma_->connect(peer.address, &rma_));  // without it, payloads go over the streams
    }
    return {};
  }

  void send(std::vector<std::uint8_t> message) override {
    if (closing_ || !failure_.ok()) return;
    FrameHeader header;
    header.kind = FrameKind::kMessage;
    header.length = static_cast<std::uint32_t>(message.size());
    header.number = parts_out_;
    Stream& stream = *streams_.front();
    stream.queue(header, std::move(message));
    if (stream.queued_bytes() > kMostQueued) {
      return fail(Status::error(Code::kPeerLost, "the peer does not read what it is sent"));
    }
    write(stream);
  }

  void put(const void* source, std::size_t bytes, const PeerMemory& memory, Op* op) override {
    *op = {false, {}};
    if (closing_ || !failure_.ok()) {
      *op = {true, Status::error(Code::kPeerLost, "the link has ended")};
      return;
    }
    const auto& target = static_cast<const StreamPeerMemory&>(memory);
    if (target.target != nullptr) return rma_->put(source, bytes, *target.target, op);
    puts_.push_back({static_cast<const std::uint8_t*>(source), bytes, 0, bytes, target.slot, op});
    if (coder_) coder_->on_pending(true);
    for (auto& stream : streams_) write(*stream);
  }

  Status share(const Memory& memory, wire::SlotGrant* grant) override {
    MemoryKey made;
    if (rma_ != nullptr) grant->address = memory.address();
    if (const auto* attached = dynamic_cast<const AttachedMemory*>(&memory)) {
      made.rma = attached->rma->key;
      if (rma_ != nullptr) grant->rkey = encode(made);
      return {};
    }
    const auto& host = static_cast<const HostMemory&>(memory);
    if (rma_ != nullptr) {
      if (host.rma == nullptr) {
        auto status = transport_.rma_->attach(memory.address(), memory.bytes(), MemoryKind::kHost, &host.rma);
        if (!status.ok()) return status;
      }
      made.rma = host.rma->key;
    }
    if (streams_.front()->local()) {
      FrameHeader header;
      header.kind = FrameKind::kWindow;
      header.slot = grant->slot;
      header.generation = grant->generation;
      header.offset = memory.bytes();
      if (auto status = streams_.front()->queue_window(header, host.shared->descriptor()); !status.ok()) return status;
      made.shared = true;
    }
    grant->rkey = encode(made);
    return {};
  }

  Status open(const wire::SlotGrant& grant, bool map, std::unique_ptr<PeerMemory>* out) override {
    MemoryKey given;
    if (auto status = decode(grant.rkey, &given); !status.ok()) return status;
    std::unique_ptr<Mapping> mapping;
    if (given.shared) {
      const auto found = windows_.find(grant.slot);
      if (found == windows_.end() || found->second.generation != grant.generation ||
          found->second.bytes != grant.bytes) {
        return Status::error(Code::kProtocol, "the peer granted shared memory that it did not send");
      }
      const int descriptor = found->second.descriptor;
      windows_.erase(found);
      auto status = map ? Mapping::open(descriptor, grant.bytes, &mapping) : Status{};
      if (!map) ::close(descriptor);
      if (status.code == Code::kProtocol) return status;  // where it cannot be mapped it is put into
    }
    std::unique_ptr<RmaTarget> target;
    if (mapping == nullptr && rma_ != nullptr && !given.rma.empty()) {
      if (auto status = rma_->open(given.rma, grant.address, &target); !status.ok()) return status;
    }
    *out = std::make_unique<StreamPeerMemory>(wire::SlotName{grant.slot, grant.generation}, std::move(mapping),
                                              std::move(target));
    return {};
  }

  bool drained() override { return !streams_.front()->blocked(); }

  void close() override {
    if (closing_) return;
    closing_ = true;
    closed_ns_ = transport_.clock_->now_ns();
    end_puts(Status::error(Code::kPeerLost, "the link has ended"));
    for (auto& stream : streams_) stream->shut();
    if (rma_ != nullptr) rma_->close();
    if (failure_.ok()) return;
    for (auto& stream : streams_) transport_.forget(*stream);  // the peer has ended already
    open_ = 0;
  }

  bool closed() const override {
    if (!closing_ || (rma_ != nullptr && !rma_->closed())) return false;
    return open_ == 0 || transport_.clock_->now_ns() > closed_ns_ + kShutNs;
  }

  const Status& failure() const override { return failure_.ok() && rma_ != nullptr ? rma_->failure() : failure_; }

  // What the transport calls when a socket can be used.
  bool on_ready(Stream& stream, bool readable, bool writable) {
    if (closing_) {
      if (readable && stream.discard()) {
        transport_.forget(stream);
        --open_;
      }
      return true;
    }
    bool moved = false;
    if (writable && failure_.ok()) moved |= write(stream);
    if (readable && failure_.ok()) moved |= stream.read();
    if (!failure_.ok() && !closing_) transport_.forget(stream);  // it would be ready for ever
    return moved;
  }

  std::size_t open_ = 0;  // streams whose other side has not ended

 private:
  struct Window {
    std::uint32_t generation;
    std::size_t bytes;
    int descriptor;
  };

  bool write(Stream& stream) {
    if (coder_) coder_->look(streams_);
    const bool moved = stream.write();
    transport_.update(stream);
    return moved;
  }

  bool code_part(const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out) override {
    return coder_ && coder_->code(data, bytes, out);
  }

  void on_frame(const FrameHeader& header, const std::uint8_t* data) override {
    if (header.number > parts_in_ || !held_.empty()) {  // after parts that are on their way on other streams
      held_.emplace_back(header.number, std::vector<std::uint8_t>(data, data + header.length));
      return;
    }
    transport_.sink_->on_message(link_, data, header.length);
  }

  void on_window(const FrameHeader& header, int descriptor) override {
    const auto [at, fresh] = windows_.try_emplace(header.slot);
    if (!fresh) ::close(at->second.descriptor);
    at->second = {header.generation, static_cast<std::size_t>(header.offset), descriptor};
  }

  void* on_part(const FrameHeader& header, std::size_t done) override {
    if (header.number < parts_in_ || header.number - parts_in_ > kMostAhead || early_.count(header.number) != 0) {
      fail(Status::error(Code::kMalformed, "a part of a payload came twice"));
      return nullptr;
    }
    void* to =
        transport_.sink_->on_put(link_, {header.slot, header.generation}, header.offset + done, header.length - done);
    if (to == nullptr) {
      fail(Status::error(Code::kProtocol, "a payload came for slot " + std::to_string(header.slot) + " generation " +
                                              std::to_string(header.generation) +
                                              ", which the sender does not hold, or for bytes outside of it"));
    }
    return to;
  }

  void on_part_end(const FrameHeader& header) override {
    early_.insert(header.number);
    while (early_.erase(parts_in_) != 0) ++parts_in_;
    while (!held_.empty() && held_.front().first <= parts_in_) {
      const auto message = std::move(held_.front().second);
      held_.pop_front();
      transport_.sink_->on_message(link_, message.data(), message.size());
    }
  }

  StreamPut* next_part(FrameHeader* header, const std::uint8_t** data) override {
    for (auto& put : puts_) {
      if (put.taken == put.bytes) continue;
      const std::size_t bytes =
          std::min(coder_ && coder_->codes() ? kCodedPartBytes : kPartBytes, put.bytes - put.taken);
      header->kind = FrameKind::kPayload;
      header->length = static_cast<std::uint32_t>(bytes);
      header->number = parts_out_++;
      header->slot = put.slot.slot;
      header->generation = put.slot.generation;
      header->offset = put.taken;
      *data = put.source + put.taken;
      put.taken += bytes;
      return &put;
    }
    return nullptr;
  }

  void on_part_sent(StreamPut* put, std::size_t bytes) override {
    put->left -= bytes;
    if (put->left > 0) return;
    put->op->done = true;
    puts_.remove_if([&](const StreamPut& at) { return &at == put; });
    if (coder_ && puts_.empty()) coder_->on_pending(false);
  }

  void fail(Status status) override {
    if (!failure_.ok()) return;
    failure_ = std::move(status);
    if (!closing_) end_puts(failure_);
  }

  // Nothing of a source is read after this: what is queued never leaves.
  void end_puts(const Status& status) {
    for (auto& put : puts_) *put.op = {true, status};
    puts_.clear();
  }

  StreamTransport& transport_;
  const std::uint64_t link_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::unique_ptr<RmaEndpoint> rma_;
  Status failure_;
  bool closing_ = false;
  std::uint64_t closed_ns_ = 0;
  std::optional<LinkCoder> coder_;  // of a sender's link that may code
  std::list<StreamPut> puts_;
  std::uint64_t parts_out_ = 0;                                           // taken by streams
  std::uint64_t parts_in_ = 0;                                            // all before this one are in their slots
  std::set<std::uint64_t> early_;                                         // and some that come later
  std::deque<std::pair<std::uint64_t, std::vector<std::uint8_t>>> held_;  // messages after parts
  std::map<std::uint32_t, Window> windows_;                               // by slot: sent, and not granted yet
};

StreamTransport::StreamTransport(std::shared_ptr<const Clock> clock, std::unique_ptr<Rma> rma)
    : clock_(std::move(clock)),
      rma_(std::move(rma)),
      address_(rma_ != nullptr ? rma_->address() : std::vector<std::uint8_t>{}) {}

StreamTransport::~StreamTransport() {
  if (poll_fd_ >= 0) ::close(poll_fd_);
}

Status StreamTransport::start(Sink* sink) {
  sink_ = sink;
  poll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  bool made = poll_fd_ >= 0;
  if (made && rma_ != nullptr) {
    epoll_event event{};
    event.events = EPOLLIN;
    made = epoll_ctl(poll_fd_, EPOLL_CTL_ADD, rma_->event_fd(), &event) == 0;
  }
  return made ? Status{} : Status::error(Code::kTransport, std::string("data connections: ") + std::strerror(errno));
}

void StreamTransport::close() {
  if (rma_ != nullptr) rma_->close();
}

Status StreamTransport::connect(const PeerAddress& peer, std::unique_ptr<Endpoint>* out) {
  auto made = std::make_unique<StreamEndpoint>(*this, peer.link);
  if (auto status = made->start(peer); !status.ok()) return status;
  *out = std::move(made);
  return {};
}

Status StreamTransport::watch(StreamEndpoint& endpoint, Stream& stream) {
  stream.tag = next_tag_++;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = stream.tag;
  if (epoll_ctl(poll_fd_, EPOLL_CTL_ADD, stream.descriptor(), &event) != 0) {
    return Status::error(Code::kTransport, std::string("data connection: ") + std::strerror(errno));
  }
  streams_[stream.tag] = {&endpoint, &stream};
  ++endpoint.open_;
  return {};
}

void StreamTransport::update(Stream& stream) {
  if (stream.watched == stream.waits() || streams_.count(stream.tag) == 0) return;
  stream.watched = stream.waits();
  epoll_event event{};
  event.events = stream.watched ? EPOLLIN | EPOLLOUT : EPOLLIN;
  event.data.u64 = stream.tag;
  static_cast<void>(epoll_ctl(poll_fd_, EPOLL_CTL_MOD, stream.descriptor(), &event));
}

void StreamTransport::forget(Stream& stream) {
  if (streams_.erase(stream.tag) == 0) return;
  static_cast<void>(epoll_ctl(poll_fd_, EPOLL_CTL_DEL, stream.descriptor(), nullptr));
}

bool StreamTransport::progress() {
  epoll_event events[16];
  const int ready = epoll_wait(poll_fd_, events, 16, 0);
  bool moved = rma_ != nullptr && rma_->progress();
  more_ = ready == 16;
  for (int i = 0; i < ready; ++i) {
    const auto found = streams_.find(events[i].data.u64);
    if (found == streams_.end()) continue;  // forgotten in this loop, or UCX's
    const auto [endpoint, stream] = found->second;
    const std::uint32_t what = events[i].events;
    moved |= endpoint->on_ready(*stream, (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0, (what & EPOLLOUT) != 0);
    more_ |= what != EPOLLIN || !stream->emptied();
  }
  return moved;
}

Status StreamTransport::allocate(std::size_t bytes, std::unique_ptr<Memory>* out) {
  std::unique_ptr<SharedMemory> shared;
  if (auto status = SharedMemory::allocate(bytes, &shared); !status.ok()) return status;
  *out = std::make_unique<HostMemory>(std::move(shared));
  return {};
}

Status StreamTransport::attach(std::uint64_t address, std::size_t bytes, MemoryKind kind,
                               std::unique_ptr<Memory>* out) {
  if (rma_ == nullptr) return Status::error(Code::kUnsupported, "there is no RDMA here");
  std::unique_ptr<RmaMemory> made;
  if (auto status = rma_->attach(address, bytes, kind, &made); !status.ok()) return status;
  *out = std::make_unique<AttachedMemory>(address, bytes, std::move(made));
  return {};
}

}  // namespace hetkv::transport
