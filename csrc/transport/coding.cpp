#include "transport/coding.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <utility>

namespace hetkv::transport {
namespace {

constexpr double kGain = 1.05;   // from which on it is worth a trial
constexpr double kShare = 0.7;   // of the progress thread, for the coder: the rest packs and sends
constexpr double kForget = 0.1;  // of what the coder was measured at, in each window in which it does nothing
constexpr double kNewest = 0.3;  // weight of one window: others of the host take the CPU now and then
constexpr double kHopeless = 0.7;
constexpr std::uint32_t kTrial = 3;  // windows
constexpr std::uint32_t kMostPatience = 256;

double mixed(double old, double newest, double weight) {
  return old + weight * (newest - old);
}

}  // namespace

bool add_use(int descriptor, LinkUse* use) {
  tcp_info info{};
  socklen_t size = sizeof info;
  if (getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return false;
  if (size < offsetof(tcp_info, tcpi_busy_time) + sizeof info.tcpi_busy_time) return false;
  use->acked_bytes += info.tcpi_bytes_acked;
  use->busy_ns = std::max<std::uint64_t>(use->busy_ns, info.tcpi_busy_time * 1000);
  return true;
}

void CodingChoice::on_part(std::size_t plain_bytes, std::size_t coded_bytes, std::uint64_t ns) {
  parts_.plain += static_cast<double>(plain_bytes);
  parts_.coded += static_cast<double>(coded_bytes);
  parts_.ns += static_cast<double>(ns);
}

void CodingChoice::add_parts() {
  if (parts_.plain > 0) {
    coder_ = mixed(coder_, parts_.plain * 1e9 / std::max(parts_.ns, 1.0), kNewest);
    ratio_ = mixed(ratio_, parts_.plain / parts_.coded, 0.5);
  } else {
    coder_ = mixed(coder_, kCoder, kForget);
  }
  parts_ = {};
}

bool CodingChoice::pays() const {
  return std::min(plain_ * ratio_, kShare * coder_) > kGain * plain_;
}

void CodingChoice::on_use(const LinkUse& use) {
  if (use.busy_ns < before_.busy_ns || use.acked_bytes < before_.acked_bytes) before_ = use;
  const std::uint64_t ns = use.busy_ns - before_.busy_ns;
  const std::uint64_t bytes = use.acked_bytes - before_.acked_bytes;
  const std::uint64_t pending = use.pending_ns - before_.pending_ns;
  if (ns < kLeastNs || bytes < kLeastBytes) return;
  before_ = use;
  add_parts();
  const double rate = static_cast<double>(bytes) * 1e9 / static_cast<double>(ns);
  link_ = link_ == 0 ? rate : mixed(link_, rate, kNewest);
  const double through = static_cast<double>(bytes) * ratio_ * 1e9 / static_cast<double>(std::max(ns, pending));
  if (!std::exchange(fresh_, false)) judge(through);
}

// `through`: plain bytes a second, as they are coded now. Of an uncoded link what counts is the wire's rate, as it
// takes into buffers what it has not sent yet.
void CodingChoice::judge(double through) {
  if (!coded_) {
    plain_ = link_;
    if (wait_ > 0) {
      --wait_;
    } else if (pays()) {
      coded_ = fresh_ = true;
      windows_ = 0;
    }
    return;
  }
  through_ = windows_ == 0 ? through : mixed(through_, through, kNewest);
  if (++windows_ < kTrial && through_ > kHopeless * plain_) return;
  if (through_ > kGain * plain_ && coder_ > link_) {  // the link may have become faster than the coder
    if (windows_ > 4 * kTrial) patience_ = 1;
    return;
  }
  coded_ = false;
  fresh_ = true;
  wait_ = patience_;
  patience_ = std::min(2 * patience_, kMostPatience);
}

}  // namespace hetkv::transport
