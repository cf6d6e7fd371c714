// One connected socket that belongs to a link: frames out, frames in. Both ways non-blocking; nothing of a frame is
// used before its header's MAC holds.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "codec/part.h"
#include "transport/seal.h"
#include "transport/stream_frame.h"
#include "transport/transport.h"

namespace hetkv::transport {

// A put under way: cut into parts, which the streams of its link take in turn.
struct StreamPut {
  const std::uint8_t* source = nullptr;
  std::size_t bytes = 0;
  std::size_t taken = 0;  // by streams
  std::size_t left = 0;   // to be handed to the kernel
  wire::SlotName slot;
  Op* op = nullptr;
};

// What a stream asks of the link that it belongs to.
class StreamOwner {
 public:
  virtual ~StreamOwner() = default;
  virtual void on_frame(const FrameHeader& header, const std::uint8_t* data) = 0;  // a message
  // Takes over the descriptor.
  virtual void on_window(const FrameHeader& header, int descriptor) = 0;
  // Where the next bytes of a part go; null: they may not.
  virtual void* on_part(const FrameHeader& header, std::size_t done) = 0;
  virtual void on_part_end(const FrameHeader& header) = 0;
  // The next part to send: of which put, and where in it; null: there is none.
  virtual StreamPut* next_part(FrameHeader* header, const std::uint8_t** data) = 0;
  // Codes the part; false: it is sent as it is.
  virtual bool code_part(const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out) = 0;
  virtual void on_part_sent(StreamPut* put, std::size_t bytes) = 0;
  virtual void fail(Status status) = 0;
};

class Stream {
 public:
  // Takes the descriptor over; that of the configuration is not used. `first`: the stream that carries messages, too.
  // `accept`: coded parts that may come.
  Stream(StreamOwner& owner, int descriptor, const StreamConfig& config, bool first, codec::ValuesMask accept = 0);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int descriptor() const { return descriptor_; }
  bool local() const { return local_; }  // a unix socket: it can pass descriptors

  void queue(FrameHeader header, std::vector<std::uint8_t> body);
  // The descriptor stays the caller's and may be closed.
  Status queue_window(FrameHeader header, int descriptor);
  std::size_t queued_bytes() const { return queued_bytes_; }
  // Something is left that the kernel did not take.
  bool blocked() const { return !out_.empty(); }
  // write() has more to do once there is room: what is left, or parts that nobody has taken yet.
  bool waits() const { return blocked() || more_; }

  // Hands to the kernel what it takes; true: some.
  bool write();
  // Takes what has come; true: some.
  bool read();
  // The last read() took all that there was.
  bool emptied() const { return emptied_; }

  // Sends nothing more, and reads only to let the peer end: true once it has.
  void shut();
  bool discard();

  bool watched = false;   // the transport waits for room to write
  std::uint64_t tag = 0;  // the transport's own

 private:
  struct Outgoing {
    FrameHeader header;
    SealTag tag{};  // in place of the header's MAC, where the stream is encrypted
    std::vector<std::uint8_t> body;
    const std::uint8_t* data = nullptr;  // of the body, or of a put's source
    int descriptor = -1;
    StreamPut* put = nullptr;
    std::size_t plain = 0;  // bytes of the put
  };
  static Status broken(int error);
  void append(Outgoing frame);
  void sent(std::size_t bytes);
  bool parse();
  bool parse_sealed();
  bool take_payload();
  bool take_whole(std::uint8_t* body);
  bool take_coded(const std::uint8_t* body);
  bool misplaced();
  bool end(Code code, std::string why);
  long receive();
  std::size_t missing() const;

  StreamOwner& owner_;
  int descriptor_;
  const wire::SipKey send_key_;
  const wire::SipKey receive_key_;
  const bool first_;
  std::optional<Seal> close_seal_;  // of an encrypted stream
  std::optional<Seal> open_seal_;
  const codec::ValuesMask accept_;
  std::optional<codec::PartDecoder> decoder_;
  const std::size_t head_bytes_;  // of a frame's header, with its MAC or tag
  std::vector<std::uint8_t> spare_;
  bool local_ = false;
  bool ended_ = false;

  std::deque<Outgoing> out_;
  std::size_t out_done_ = 0;  // bytes of the first one that have left
  std::size_t queued_bytes_ = 0;
  bool more_ = false;  // the last write() ended at its turn's bound
  std::uint64_t frames_out_ = 0;

  std::vector<std::uint8_t> in_;
  std::size_t in_begin_ = 0;
  std::size_t in_end_ = 0;
  std::uint64_t frames_in_ = 0;
  FrameHeader header_;        // of the frame that is being read,
  bool have_header_ = false;  // if there is one
  std::size_t part_done_ = 0;
  std::size_t decoded_ = 0;  // bytes, in this turn
  bool emptied_ = false;
  std::deque<int> descriptors_;  // that came, for frames that follow
};

}  // namespace hetkv::transport
