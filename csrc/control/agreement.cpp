#include "control/agreement.h"

#include <algorithm>
#include <set>
#include <string>

namespace hetkv::control {
namespace {

constexpr std::int64_t kPartAlignment = 8;  // of each segment in a payload
constexpr std::size_t kMaxParts = 4;        // segments of a frame

std::string text(const std::optional<std::int64_t>& value) {
  return value ? std::to_string(*value) : "None";
}

Incompatible different(const std::string& field, std::int64_t mine, std::int64_t theirs) {
  return {field, std::to_string(mine), std::to_string(theirs), ""};
}

// The first difference of two specs. The number of layers comes first, so that no layer is compared with another.
Incompatible compare(const Spec& mine, const Spec& theirs) {
  if (mine.layers.size() != theirs.layers.size()) {
    return different("len(spec.layers)", static_cast<std::int64_t>(mine.layers.size()),
                     static_cast<std::int64_t>(theirs.layers.size()));
  }
  for (std::size_t at = 0; at < mine.layers.size(); ++at) {
    const LayerSpec &ours = mine.layers[at], &other = theirs.layers[at];
    const std::string where = "spec.layers[" + std::to_string(at) + "]";
    if (ours.kind != other.kind) return {where + ".kind", ours.kind, other.kind, ""};
    if (ours.segments.size() != other.segments.size()) {
      return different("len(" + where + ".segments)", static_cast<std::int64_t>(ours.segments.size()),
                       static_cast<std::int64_t>(other.segments.size()));
    }
    for (std::size_t part = 0; part < ours.segments.size(); ++part) {
      const Segment &a = ours.segments[part], &b = other.segments[part];
      const std::string segment = where + ".segments[" + std::to_string(part) + "]";
      if (a.name != b.name) return {segment + ".name", a.name, b.name, ""};
      if (a.heads != b.heads) return different(segment + ".heads", a.heads, b.heads);
      if (a.channels != b.channels) return different(segment + ".channels", a.channels, b.channels);
    }
    if (ours.group != other.group) return different(where + ".group", ours.group, other.group);
    if (ours.sliding_window != other.sliding_window)
      return {where + ".sliding_window", text(ours.sliding_window), text(other.sliding_window), ""};
    if (ours.shares != other.shares) return {where + ".shares", text(ours.shares), text(other.shares), ""};
  }
  return {};
}

Incompatible compare_heartbeats(const Description& mine, const Description& theirs) {
  const std::string why = "a timeout must be at least twice the other side's interval";
  const auto say = [](const char* what, std::int64_t ms) { return std::string(what) + " " + std::to_string(ms); };
  if (mine.heartbeat_timeout_ms < 2 * theirs.heartbeat_interval_ms) {
    return {"heartbeat_ms", say("timeout", mine.heartbeat_timeout_ms), say("interval", theirs.heartbeat_interval_ms),
            why};
  }
  if (theirs.heartbeat_timeout_ms < 2 * mine.heartbeat_interval_ms) {
    return {"heartbeat_ms", say("interval", mine.heartbeat_interval_ms), say("timeout", theirs.heartbeat_timeout_ms),
            why};
  }
  return {};
}

std::string text(const Description& side) {
  const Interval& layers = side.shard.layers;
  const auto say = [](const Interval& at) {
    return "[" + std::to_string(at.start) + ", " + std::to_string(at.stop) + ")";
  };
  std::set<Interval> heads;
  for (std::int64_t layer = layers.start; layer < layers.stop; ++layer) {
    heads.insert(side.shard.heads[static_cast<std::size_t>(layer)]);
  }
  std::string out = "layers " + say(layers) + ", heads ";
  for (const Interval& one : heads) out += (one == *heads.begin() ? "" : " and ") + say(one);
  return out;
}

// How each segment of a layer travels; what does not fit has the sender's value as `mine`.
Incompatible convert(const Description& sender, const Description& receiver, std::int64_t layer, const Interval& heads,
                     std::vector<Conversion>* out) {
  const auto at = static_cast<std::size_t>(layer);
  const LayerSpec& spec = sender.spec.layers[at];
  out->clear();
  for (const Segment& segment : spec.segments) {
    const SegmentLayout& src = sender.layout(layer)->segments.at(segment.name);
    const SegmentLayout& dst = receiver.layout(layer)->segments.at(segment.name);
    Incompatible found;
    if (spec.kind == "state" && (src.dtype != DType::kUInt8 || dst.dtype != DType::kUInt8)) {
      found = {"dtype", name_of(src.dtype), name_of(dst.dtype), "state is opaque bytes, uint8"};
    } else {
      out->push_back(segment_conversion(src, dst, heads, sender.shard.heads[at], receiver.shard.heads[at], &found));
    }
    if (found.found()) {
      found.field = "layers[" + std::to_string(layer) + "]." + segment.name + "." + found.field;
      return found;
    }
  }
  if (out->size() > kMaxParts) {
    const std::string count = std::to_string(out->size());
    return {"layers[" + std::to_string(layer) + "].segments", count, count, "a frame holds 4 segments"};
  }
  return {};
}

// Payload bytes of one token: the least that a slot must hold.
std::int64_t token_bytes(const LayerSpec& layer, const std::vector<Conversion>& conversions, std::int64_t heads) {
  std::int64_t total = 0;
  for (std::size_t at = 0; at < conversions.size(); ++at) {
    const std::int64_t bytes = heads * layer.segments[at].channels * item_size(conversions[at].wire);
    total += (bytes + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
  }
  return total;
}

Incompatible turned(Incompatible found, bool turn) {
  if (turn) std::swap(found.mine, found.theirs);
  return found;
}

}  // namespace

Incompatible agree(const Description& mine, const Description& theirs, Agreement* out) {
  *out = {};
  if (mine.role == theirs.role) return {"role", name_of(mine.role), name_of(theirs.role), ""};
  Incompatible found = compare(mine.spec, theirs.spec);
  if (found.found()) return found;
  for (const auto& [name, value] : mine.fingerprint) {
    const auto at = theirs.fingerprint.find(name);
    if (at != theirs.fingerprint.end() && at->second != value) {
      return {"fingerprint." + name, value, at->second, ""};
    }
  }
  found = compare_heartbeats(mine, theirs);
  if (found.found()) return found;
  const bool sends = mine.role == Role::kSender;
  const Description &sender = sends ? mine : theirs, &receiver = sends ? theirs : mine;
  const auto shared = overlap(mine.spec, mine.shard, theirs.shard);
  if (shared.empty()) return {"shard", text(mine), text(theirs), "no layer and head is on both sides"};
  std::int64_t need = 0;
  std::vector<Conversion> conversions;
  for (const auto& [layer, heads] : shared) {
    found = convert(sender, receiver, layer, heads, &conversions);
    if (found.found()) return turned(found, !sends);
    need = std::max(need, token_bytes(mine.spec.layers[static_cast<std::size_t>(layer)], conversions, heads.size()));
  }
  if (receiver.slot_bytes < need) {
    return turned({"slot_bytes", "frames of at least " + std::to_string(need) + " bytes",
                   "slots of " + std::to_string(receiver.slot_bytes) + " bytes", "a slot holds one token of a layer"},
                  !sends);
  }
  std::vector<Route> between;
  const Status status = routes(mine.spec, sender.shards(), receiver.shards(), &between);
  if (!status.ok()) {
    const bool alone = sender.instance_shards.empty();
    return {alone ? "instance_shards" : "shard", text(mine), text(theirs),
            status.detail + (alone ? ": give tp and pp, or instance_shards, to every rank of the sending instance"
                                   : ": ranks are missing")};
  }
  for (const Route& route : between) {
    if (route.source != sender.rank || route.destination != receiver.rank) continue;
    for (std::int64_t layer = route.layers.start; layer < route.layers.stop; ++layer) {
      LayerRoute at{layer, route.heads, {}};
      found = convert(sender, receiver, layer, route.heads, &at.conversions);
      if (found.found()) return turned(found, !sends);
      out->layers.push_back(std::move(at));
    }
  }
  std::stable_sort(out->layers.begin(), out->layers.end(),
                   [](const LayerRoute& a, const LayerRoute& b) { return a.layer < b.layer; });
  const std::vector<Shard> ranks = theirs.shards();
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!overlap(mine.spec, mine.shard, ranks[rank]).empty()) out->ranks.push_back(static_cast<std::int64_t>(rank));
  }
  return {};
}

}  // namespace hetkv::control
