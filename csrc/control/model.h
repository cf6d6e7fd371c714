// What two ranks tell each other of themselves, as the C library holds it: hetkv/kv/spec.py, hetkv/kv/layout.py and
// hetkv/control/description.py, with the same names. `check` says what they say there.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "map.h"
#include "status.h"

namespace hetkv::control {

// Half-open [start, stop).
struct Interval {
  std::int64_t start = 0;
  std::int64_t stop = 0;

  std::int64_t size() const { return stop - start; }
  bool holds(std::int64_t at) const { return start <= at && at < stop; }
  bool operator==(const Interval& other) const { return start == other.start && stop == other.stop; }
  bool operator!=(const Interval& other) const { return !(*this == other); }
  bool operator<(const Interval& other) const { return start != other.start ? start < other.start : stop < other.stop; }
};

Interval intersect(const Interval& a, const Interval& b);  // empty, from the later start, where they do not meet

// One part of a layer's cache as the model has it, all heads.
struct Segment {
  std::string name;
  std::int64_t heads = 0;
  std::int64_t channels = 0;
};

struct LayerSpec {
  std::string kind;  // kv, latent, state
  std::vector<Segment> segments;
  std::int64_t group = 0;
  std::optional<std::int64_t> sliding_window;
  std::optional<std::int64_t> shares;
};

struct Spec {
  std::vector<LayerSpec> layers;

  std::int64_t groups() const;
};

// What one rank holds. `heads` has an interval for every layer of the spec.
struct Shard {
  Interval layers;
  std::vector<Interval> heads;

  static Shard of(const Spec& spec, std::int64_t tp, std::int64_t tp_rank, std::int64_t pp, std::int64_t pp_rank);
  bool operator==(const Shard& other) const { return layers == other.layers && heads == other.heads; }
};

// Scales: static `values`, or in memory, which this library's own pools do not have.
struct Scale {
  std::vector<double> values;
};

struct SegmentLayout {
  DType dtype = DType::kUInt8;
  std::int64_t heads = 0;
  std::int64_t channels = 0;
  std::int64_t offset = 0;
  std::int64_t block_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t inner_stride = 0;
  std::int64_t pack = 0;
  std::int64_t outer_stride = 0;
  std::optional<Scale> scale;

  bool scales_in_memory() const { return scale && scale->values.empty(); }
};

struct Layout {
  std::string name;
  std::int64_t block_size = 0;
  std::map<std::string, SegmentLayout> segments;
  bool shared = false;
};

// Layers that are alike.
struct LayerGroup {
  std::vector<std::int64_t> layers;
  std::int64_t blocks = 0;
  Layout layout;
};

enum class Role : std::uint8_t { kSender = 1, kReceiver = 2 };

inline Role other(Role role) {
  return role == Role::kSender ? Role::kReceiver : Role::kSender;
}
const char* name_of(Role role);
const char* name_of(DType dtype);
std::optional<DType> dtype_of(const std::string& name);

struct Description {
  Role role = Role::kSender;
  std::string instance;
  std::int64_t pid = 0;
  std::string host;
  Spec spec;
  Shard shard;
  std::vector<LayerGroup> layers;
  std::vector<std::uint8_t> worker_address;
  std::int64_t slot_bytes = 0;
  std::int64_t heartbeat_interval_ms = 0;
  std::int64_t heartbeat_timeout_ms = 0;
  std::int64_t lease_ms = 0;
  std::int64_t rank = 0;
  std::vector<Shard> instance_shards;  // empty: this rank is alone
  std::string device = "cpu";
  std::map<std::string, std::string> fingerprint;
  std::vector<std::uint8_t> engine;  // number of this engine, at most 16 bytes
  std::vector<std::string> sockets;  // unix sockets at which a listening side takes streams, too

  std::vector<Shard> shards() const;               // of the whole instance
  const Layout* layout(std::int64_t layer) const;  // null: another rank's
  // kMalformed with the field that cannot be.
  Status check() const;
};

// kMalformed unless the shard's layers and heads exist in the spec; `name` begins the text.
Status check_shard(const Spec& spec, const Shard& shard, const std::string& name);

}  // namespace hetkv::control
