// The coder of a sender's link: codes parts of payloads always, or where CodingChoice says that it pays.
#pragma once

#include <memory>
#include <vector>

#include "clock.h"
#include "transport/coding.h"
#include "transport/transport.h"

namespace hetkv::transport {

class LinkCoder {
 public:
  // `coding` has values, and has_zstd() where they need it.
  LinkCoder(const Coding& coding, const Clock& clock) : coding_(coding), clock_(clock) {}

  // The next part is coded, where it becomes smaller.
  bool codes() const { return coding_.always || choice_.coded(); }
  // False: it is sent as it is.
  bool code(const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out);

  // Whether there is something to send from now on.
  void on_pending(bool any);
  // Now and then, with the link's sockets.
  template <typename Streams>
  void look(const Streams& streams) {
    const std::uint64_t now = clock_.now_ns();
    if (coding_.always || now < looked_ns_ + kLookNs) return;
    looked_ns_ = now;
    LinkUse use;
    use.pending_ns = pending_ns_ + (pending_ ? now - since_ns_ : 0);
    for (const auto& stream : streams) {
      if (!add_use(stream->descriptor(), &use)) return;
    }
    choice_.on_use(use);
  }

 private:
  static constexpr std::uint64_t kLookNs = 5'000'000;

  const Coding coding_;
  const Clock& clock_;
  codec::PartEncoder encoder_;
  CodingChoice choice_;
  std::uint64_t looked_ns_ = 0;
  bool pending_ = false;
  std::uint64_t pending_ns_ = 0;  // without the time since `since_ns_`
  std::uint64_t since_ns_ = 0;
};

}  // namespace hetkv::transport
