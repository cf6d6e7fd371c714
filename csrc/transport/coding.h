// Whether the parts of a link's payloads are coded before they are sent (codec/part.h): by the rate at which its TCP
// connections take bytes while they are busy, and the coder's own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hetkv::transport {

// All counted from the start of a link.
struct LinkUse {
  std::uint64_t acked_bytes = 0;
  std::uint64_t busy_ns = 0;     // in which some bytes were on their way
  std::uint64_t pending_ns = 0;  // in which this side had some to send
};

// Adds what the kernel counts of a TCP socket: bytes to the bytes, and the busy time where it is longer. False: it does
// not count.
bool add_use(int descriptor, LinkUse* use);

// Begins uncoded. Where the link takes fewer bytes a second than coding would let through, it tries coding, and keeps
// to it for as long as more gets through than did without. A trial that failed is repeated ever more rarely.
class CodingChoice {
 public:
  // A part was coded, in so long; `coded_bytes` equal to `plain_bytes`: it did not become smaller.
  void on_part(std::size_t plain_bytes, std::size_t coded_bytes, std::uint64_t ns);
  // What the link's connections have done so far. Rates are of at least kLeastNs of use.
  void on_use(const LinkUse& use);

  bool coded() const { return coded_; }

  static constexpr std::uint64_t kLeastNs = 40'000'000;
  static constexpr std::uint64_t kLeastBytes = 128 * 1024;

 private:
  bool pays() const;
  void add_parts();
  void judge(double through);

  LinkUse before_;
  struct {
    double plain = 0;
    double coded = 0;
    double ns = 0;
  } parts_;                // of this window
  double link_ = 0;        // bytes/s on the wire while it is busy; 0: not known
  double plain_ = 0;       // the same while parts went uncoded
  double through_ = 0;     // plain bytes/s while parts are coded
  double coder_ = kCoder;  // the same of the coder alone
  double ratio_ = 1.4;     // plain bytes per byte on the wire
  bool coded_ = false;
  bool fresh_ = true;          // what is on its way is of the mode before
  std::uint32_t windows_ = 0;  // since parts are coded
  std::uint32_t wait_ = 0;     // windows until the next trial
  std::uint32_t patience_ = 1;

  static constexpr double kCoder = 0.5e9;  // until it is measured
};

}  // namespace hetkv::transport
