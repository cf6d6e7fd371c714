// One authenticated connection to one peer rank, as the progress thread sees it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/config.h"
#include "transport/transport.h"
#include "wire/message.h"

namespace hetkv::engine {

constexpr std::uint8_t kContentSince = 2;  // minor version from which tickets have contents
constexpr std::uint8_t kBundlesSince = 3;  // and from which frames share a slot

// The code that a peer of a link gets: what a device says is this side's own affair.
inline Code wire_code(Code code, std::uint8_t minor) {
  if (code == Code::kContent && minor < kContentSince) return Code::kProtocol;
  if (code == Code::kPoolChecksum) return Code::kChecksum;
  return code == Code::kDevice ? Code::kTransport : code;
}

enum class LinkState : std::uint8_t {
  kOpening,   // the peer may not know the link yet: it receives, but does not send until the peer has sent
  kUp,        // in use
  kDraining,  // lost: operations in flight are being cancelled
  kGone,      // nothing in flight; only requests that have not ended yet refer to it
};

struct Link {
  Link(std::uint32_t number, LinkConfig settings)
      : id(number), config(std::move(settings)), device_windows(config.device_windows) {}

  const std::uint32_t id;  // on this side
  const LinkConfig config;
  LinkState state = LinkState::kOpening;
  std::unique_ptr<transport::Endpoint> endpoint;
  std::uint64_t send_sequence = 0;
  std::uint64_t receive_sequence = 0;
  std::uint64_t heard_ns = 0;
  std::uint64_t sent_ns = 0;
  std::uint64_t lost_ns = 0;
  bool farewell = false;  // a goodbye is on its way
  bool device_windows;    // receiver: slots in device memory are granted to it
  bool retired = false;   // receiver: the peer is gone, as soon as the endpoint is closed

  bool up() const { return state == LinkState::kUp; }

  // Plan whose frames are exactly (layer, heads), or null.
  const LayerPlan* find(const wire::Frame& frame) const {
    for (std::size_t i = first_plan(frame.layer); i < config.plans.size() && config.plans[i].layer == frame.layer;
         ++i) {
      const LayerPlan& plan = config.plans[i];
      if (plan.head_start == frame.head_start && plan.head_stop == frame.head_stop) return &plan;
    }
    return nullptr;
  }
  // Index of the first plan of a layer; plans are in rising layer order.
  std::size_t first_plan(std::uint32_t layer) const {
    const auto& plans = config.plans;
    const auto at = std::lower_bound(plans.begin(), plans.end(), layer,
                                     [](const LayerPlan& plan, std::uint32_t key) { return plan.layer < key; });
    return static_cast<std::size_t>(at - plans.begin());
  }
  // Tokens summed over plans that `want`, token ranges per cache group, asks of this link.
  std::uint64_t plan_tokens(const std::vector<wire::TokenRange>& want) const {
    std::uint64_t total = 0;
    for (const auto& plan : config.plans) total += want[plan.group].stop - want[plan.group].start;
    return total;
  }
};

}  // namespace hetkv::engine
