// What an engine asks of a transport: links to peers, messages in order, puts into the slots that a peer grants. Every
// call belongs to the engine's progress thread, except where a comment says otherwise; nothing blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec/part.h"
#include "status.h"
#include "transport/seal.h"
#include "wire/message.h"
#include "wire/siphash.h"

namespace hetkv::transport {

// One asynchronous operation. Must stay where it is until `done`.
struct Op {
  bool done = true;
  Status status;
};

// Where the memory is that a transport is asked to reach.
enum class MemoryKind : std::uint8_t { kHost, kCuda, kRocm };

// The engine, as the transport calls it from Transport::progress. `link` is the number that connect() was given.
class Sink {
 public:
  virtual ~Sink() = default;
  // One whole message, valid in the call.
  virtual void on_message(std::uint64_t link, const std::uint8_t* data, std::size_t size) = 0;
  // Of a peer's put the bytes from `offset` of a slot are about to be written: where to. What is returned is used
  // before the transport returns, and asked for again when more come. Null: the peer may not write there, its endpoint
  // fails.
  virtual void* on_put(std::uint64_t link, wire::SlotName slot, std::uint64_t offset, std::uint64_t bytes) = 0;
};

// Memory of this side that peers write to, or that this side puts from. Given back with the object.
class Memory {
 public:
  virtual ~Memory() = default;
  std::uint64_t address() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  // Keeps host memory that this side allocated mapped, also after this object; null for the caller's memory.
  virtual std::shared_ptr<const void> backing() const { return nullptr; }

 protected:
  std::uint64_t address_ = 0;
  std::size_t bytes_ = 0;
};

// A slot of a peer's. Destroyed before its endpoint.
class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  std::uint64_t local() const { return local_; }  // where this process may store into it; 0 where it cannot
  bool rma() const { return rma_; }               // a put writes into it without the peer's help
  // Keeps the memory at local() mapped, also after this object.
  virtual std::shared_ptr<const void> backing() const { return nullptr; }

 protected:
  std::uint64_t local_ = 0;
  bool rma_ = false;
};

// One peer.
class Endpoint {
 public:
  virtual ~Endpoint() = default;

  // Takes the message over. The peer gets all messages, once each and in this order, or the endpoint fails.
  virtual void send(std::vector<std::uint8_t> message) = 0;
  // Writes `bytes` at `source` to the start of a peer's slot. `op` is done when `source` may be reused and a message
  // that is sent from then on arrives after the bytes.
  virtual void put(const void* source, std::size_t bytes, const PeerMemory& target, Op* op) = 0;

  // Lets the peer reach the slot that `grant` names: fills in `rkey`, and `address` where puts need it. An empty key:
  // it cannot be reached.
  virtual Status share(const Memory& memory, wire::SlotGrant* grant) = 0;
  // The other end of share(). `map`: for stores, too, where that is possible.
  virtual Status open(const wire::SlotGrant& grant, bool map, std::unique_ptr<PeerMemory>* out) = 0;

  // All messages so far are on their way, so that closing loses none.
  virtual bool drained() = 0;
  // Ends the link. `closed()` turns true from Transport::progress once every op has ended and no byte of the peer's
  // is written any more.
  virtual void close() = 0;
  virtual bool closed() const = 0;
  // Not ok: the link is over, and why. It still has to be closed.
  virtual const Status& failure() const = 0;
};

// A connected socket to the peer. The transport uses a duplicate, so that the descriptor stays its owner's.
struct StreamConfig {
  int descriptor = -1;
  wire::SipKey send_key{};  // of MACs, where there is no cipher
  wire::SipKey receive_key{};
  Cipher cipher = Cipher::kNone;  // must be there
  SealKey send_seal{};
  SealKey receive_seal{};
};

// What the two sides of a link have agreed on: its sender may code parts of payloads (codec/part.h).
struct Coding {
  codec::Values values = codec::Values::kNone;  // of most payload bytes of a sender's link; none: it codes nothing
  bool always = false;                          // whatever the rates
  codec::ValuesMask accept = 0;                 // receiver: parts of these may come
};

// What connect() needs to know of a peer.
struct PeerAddress {
  std::uint64_t link = 0;             // number of the link, equal on both sides
  std::vector<std::uint8_t> address;  // the peer's Transport::address()
  std::vector<StreamConfig> streams;  // in the same order on both sides
  Coding coding;                      // has_zstd() where it has values of codec::kZstdValues
};

class Transport {
 public:
  virtual ~Transport() = default;

  // Before any other call, in any thread. `sink` outlives the transport.
  virtual Status start(Sink* sink) = 0;
  // Ends all endpoints and operations. Idempotent.
  virtual void close() = 0;

  // What a peer's transport needs to know of this one. Any thread.
  virtual const std::vector<std::uint8_t>& address() const = 0;
  virtual Status connect(const PeerAddress& peer, std::unique_ptr<Endpoint>* out) = 0;

  // Moves what can be moved; false: nothing was.
  virtual bool progress() = 0;
  // After a progress() that moved something: another one at once may move more.
  virtual bool more() const { return true; }
  // True: nothing is pending, and `event_fd` becomes readable when something is; false: progress again before sleeping.
  virtual bool arm() = 0;
  virtual int event_fd() const = 0;

  // Host memory, an allocation of its own, that peers of this host can map where there is a way.
  virtual Status allocate(std::size_t bytes, std::unique_ptr<Memory>* out) = 0;
  // Whether puts can start and end in memory of this kind.
  virtual bool reaches(MemoryKind kind) const = 0;
  // Memory of the caller's, which outlives the object, for puts from or into it.
  virtual Status attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<Memory>* out) = 0;
};

}  // namespace hetkv::transport
