#include "control/messages.h"

#define MSGPACK_NO_BOOST
#include <cstring>
#include <map>
#include <msgpack.hpp>
#include <string_view>
#include <utility>

#include "wire/utf8.h"

namespace hetkv::control {
namespace {

using Packer = msgpack::packer<msgpack::sbuffer>;
using Object = msgpack::object;

constexpr std::size_t kMostItems = 1 << 16, kMostBytes = 1 << 20, kMostDepth = 16, kMostSockets = 4;
constexpr std::int64_t kMostStreams = 8;

// What decoding found first.
struct Malformed {
  std::string text;
};

// Inside this file a value that cannot be is thrown, and caught by `decode`.
[[noreturn]] void fail(const std::string& text) {
  throw Malformed{text};
}

std::int64_t integer(const Object& at, const std::string& where) {
  if (at.type == msgpack::type::POSITIVE_INTEGER && at.via.u64 <= static_cast<std::uint64_t>(INT64_MAX)) {
    return static_cast<std::int64_t>(at.via.u64);
  }
  if (at.type == msgpack::type::NEGATIVE_INTEGER) return at.via.i64;
  fail(where + " is not an integer");
}

double number(const Object& at, const std::string& where) {
  if (at.type == msgpack::type::FLOAT32 || at.type == msgpack::type::FLOAT64) return at.via.f64;
  return static_cast<double>(integer(at, where));
}

std::string text(const Object& at, const std::string& where) {
  if (at.type != msgpack::type::STR) fail(where + " is not text");
  const std::string_view found(at.via.str.ptr, at.via.str.size);
  if (wire::utf8_error(found) != found.size()) fail(where + " is not UTF-8");
  return std::string(found);
}

std::vector<const Object*> items(const Object& at, const std::string& where) {
  if (at.type != msgpack::type::ARRAY) fail(where + " is not an array");
  std::vector<const Object*> out;
  for (std::uint32_t i = 0; i < at.via.array.size; ++i) out.push_back(at.via.array.ptr + i);
  return out;
}

// A map with text as keys, each once.
std::vector<std::pair<std::string, const Object*>> entries(const Object& at, const std::string& where) {
  if (at.type != msgpack::type::MAP) fail(where + " is not a map");
  std::vector<std::pair<std::string, const Object*>> out;
  std::map<std::string, int> seen;
  for (std::uint32_t i = 0; i < at.via.map.size; ++i) {
    const auto& [key, value] = at.via.map.ptr[i];
    const std::string name = text(key, where + ": a key");
    if (++seen[name] > 1) fail(where + "." + name + " comes twice");
    out.emplace_back(name, &value);
  }
  return out;
}

// The fields of a message or structure; `end` rejects those that nobody asked for.
class Fields {
 public:
  Fields(const Object& at, std::string where) : where_(std::move(where)) {
    for (const auto& [name, value] : entries(at, where_)) found_.emplace(name, value);
  }
  // Null where it was left out or is nil.
  const Object* optional(const std::string& name) {
    const auto at = found_.find(name);
    if (at == found_.end()) return nullptr;
    const Object* value = at->second;
    found_.erase(at);
    return value->type == msgpack::type::NIL ? nullptr : value;
  }
  const Object& required(const std::string& name) {
    const Object* value = optional(name);
    if (value == nullptr) fail(path(name) + " is missing");
    return *value;
  }
  std::int64_t integer(const std::string& name) { return control::integer(required(name), path(name)); }
  std::int64_t integer(const std::string& name, std::int64_t otherwise) {
    const Object* value = optional(name);
    return value == nullptr ? otherwise : control::integer(*value, path(name));
  }
  std::string text(const std::string& name) { return control::text(required(name), path(name)); }
  std::string text(const std::string& name, const std::string& otherwise) {
    const Object* value = optional(name);
    return value == nullptr ? otherwise : control::text(*value, path(name));
  }
  std::string path(const std::string& name) const { return where_.empty() ? name : where_ + "." + name; }
  void end() const {
    if (!found_.empty()) fail(path(found_.begin()->first) + " is not known");
  }

 private:
  std::string where_;
  std::map<std::string, const Object*> found_;
};

Interval interval(const Object& at, const std::string& where) {
  const auto ends = items(at, where);
  if (ends.size() != 2) fail(where + " is not [start, stop)");
  return {integer(*ends[0], where), integer(*ends[1], where)};
}

Shard shard(const Object& at, const std::string& where) {
  Fields fields(at, where);
  Shard out{interval(fields.required("layers"), fields.path("layers")), {}};
  for (const Object* heads : items(fields.required("heads"), fields.path("heads"))) {
    out.heads.push_back(interval(*heads, fields.path("heads")));
  }
  fields.end();
  return out;
}

std::optional<std::int64_t> optional_integer(Fields& fields, const std::string& name) {
  const Object* value = fields.optional(name);
  return value == nullptr ? std::nullopt : std::optional<std::int64_t>(integer(*value, fields.path(name)));
}

Spec spec(const Object& at) {
  Fields fields(at, "spec");
  Spec out;
  for (const Object* one : items(fields.required("layers"), "spec.layers")) {
    Fields of(*one, "spec.layers[" + std::to_string(out.layers.size()) + "]");
    LayerSpec layer;
    layer.kind = of.text("kind");
    for (const Object* part : items(of.required("segments"), of.path("segments"))) {
      const auto parts = items(*part, of.path("segments"));
      if (parts.size() != 3) fail(of.path("segments") + ": a segment is name, heads, channels");
      layer.segments.push_back({text(*parts[0], of.path("segments")), integer(*parts[1], of.path("segments")),
                                integer(*parts[2], of.path("segments"))});
    }
    layer.group = of.integer("group", 0);
    layer.window = optional_integer(of, "window");
    layer.shares = optional_integer(of, "shares");
    of.end();
    out.layers.push_back(std::move(layer));
  }
  fields.end();
  return out;
}

Scale scale(const Object& at, const std::string& where) {
  Fields fields(at, where);
  Scale out;
  if (const Object* values = fields.optional("values")) {
    for (const Object* value : items(*values, fields.path("values"))) out.values.push_back(number(*value, where));
  }
  for (const char* name :
       {"offset", "block_stride", "token_stride", "head_stride", "group_stride", "channels_per_scale"}) {
    const std::int64_t value = fields.integer(name, 0);
    if (value < 0 || (value > 0 && !out.values.empty())) fail(fields.path(name));
  }
  if (const Object* apart = fields.optional("apart")) {
    if (apart->type != msgpack::type::BOOLEAN) fail(fields.path("apart"));
  }
  fields.end();
  return out;
}

Layout layout(const Object& at, const std::string& where) {
  Fields fields(at, where);
  Layout out;
  out.name = fields.text("name");
  out.block_size = fields.integer("block_size");
  for (const auto& [name, value] : entries(fields.required("segments"), fields.path("segments"))) {
    Fields of(*value, fields.path("segments") + "." + name);
    SegmentLayout part;
    const std::string dtype = of.text("dtype");
    const auto known = dtype_of(dtype);
    if (!known) fail(of.path("dtype") + " " + dtype + " is not known");
    part.dtype = *known;
    for (const auto& [field, to] : {std::pair<const char*, std::int64_t*>{"heads", &part.heads},
                                    {"channels", &part.channels},
                                    {"offset", &part.offset},
                                    {"block_stride", &part.block_stride},
                                    {"token_stride", &part.token_stride},
                                    {"head_stride", &part.head_stride},
                                    {"inner_stride", &part.inner_stride},
                                    {"pack", &part.pack}}) {
      *to = of.integer(field);
    }
    part.outer_stride = of.integer("outer_stride", 0);
    if (const Object* scales = of.optional("scale")) part.scale = scale(*scales, of.path("scale"));
    of.end();
    out.segments.emplace(name, std::move(part));
  }
  if (const Object* shared = fields.optional("shared")) {
    if (shared->type != msgpack::type::BOOLEAN) fail(fields.path("shared"));
    out.shared = shared->via.boolean;
  }
  fields.end();
  return out;
}

Bytes binary(Fields& fields, const std::string& name) {
  const Object* at = fields.optional(name);
  if (at == nullptr) return {};
  if (at->type != msgpack::type::BIN) fail(fields.path(name) + " is not binary");
  const auto* first = reinterpret_cast<const std::uint8_t*>(at->via.bin.ptr);
  return {first, first + at->via.bin.size};
}

Description description(Fields& fields) {
  Description out;
  const std::string role = fields.text("role");
  if (role != "sender" && role != "receiver") fail("role " + role);
  out.role = role == "sender" ? Role::kSender : Role::kReceiver;
  out.instance = fields.text("instance");
  out.pid = fields.integer("pid");
  out.host = fields.text("host");
  out.spec = spec(fields.required("spec"));
  out.shard = shard(fields.required("shard"), "shard");
  for (const Object* one : items(fields.required("layers"), "layers")) {
    Fields of(*one, "layers");
    LayerGroup group;
    for (const Object* layer : items(of.required("layers"), "layers.layers")) {
      group.layers.push_back(integer(*layer, "layers.layers"));
    }
    group.blocks = of.integer("num_blocks");
    group.layout = layout(of.required("layout"), "layers.layout");
    of.end();
    out.layers.push_back(std::move(group));
  }
  out.worker_address = binary(fields, "worker_address");
  out.engine = binary(fields, "engine");
  out.slot_bytes = fields.integer("slot_bytes");
  out.heartbeat_interval_ms = fields.integer("heartbeat_interval_ms");
  out.heartbeat_timeout_ms = fields.integer("heartbeat_timeout_ms");
  out.lease_ms = fields.integer("lease_ms");
  out.rank = fields.integer("rank", 0);
  if (const Object* shards = fields.optional("instance_shards")) {
    for (const Object* one : items(*shards, "instance_shards")) out.instance_shards.push_back(shard(*one, "shard"));
  }
  out.device = fields.text("device", "cpu");
  if (const Object* fingerprint = fields.optional("fingerprint")) {
    for (const auto& [name, value] : entries(*fingerprint, "fingerprint")) {
      out.fingerprint.emplace(name, text(*value, "fingerprint." + name));
    }
  }
  if (const Object* sockets = fields.optional("sockets")) {
    for (const Object* name : items(*sockets, "sockets")) out.sockets.push_back(text(*name, "sockets"));
    if (out.sockets.size() > kMostSockets) fail("sockets are too many");
  }
  return out;
}

// --- encoding ---

void key(Packer& pack, const char* name) {
  pack.pack_str(static_cast<std::uint32_t>(std::strlen(name)))
      .pack_str_body(name, static_cast<std::uint32_t>(std::strlen(name)));
}

void put(Packer& pack, const char* name, std::int64_t value) {
  key(pack, name);
  pack.pack_int64(value);
}

void put(Packer& pack, const char* name, const std::string& value) {
  key(pack, name);
  pack.pack(value);
}

void put(Packer& pack, const char* name, const std::optional<std::int64_t>& value) {
  key(pack, name);
  if (value) {
    pack.pack_int64(*value);
  } else {
    pack.pack_nil();
  }
}

void put(Packer& pack, const char* name, const Bytes& value) {
  key(pack, name);
  const auto size = static_cast<std::uint32_t>(value.size());
  pack.pack_bin(size).pack_bin_body(reinterpret_cast<const char*>(value.data()), size);
}

void put(Packer& pack, const Interval& value) {
  pack.pack_array(2);
  pack.pack_int64(value.start);
  pack.pack_int64(value.stop);
}

void put(Packer& pack, const Shard& shard) {
  pack.pack_map(2);
  key(pack, "layers");
  put(pack, shard.layers);
  key(pack, "heads");
  pack.pack_array(static_cast<std::uint32_t>(shard.heads.size()));
  for (const Interval& heads : shard.heads) put(pack, heads);
}

void put(Packer& pack, const Spec& spec) {
  pack.pack_map(1);
  key(pack, "layers");
  pack.pack_array(static_cast<std::uint32_t>(spec.layers.size()));
  for (const LayerSpec& layer : spec.layers) {
    pack.pack_map(5);
    put(pack, "kind", layer.kind);
    key(pack, "segments");
    pack.pack_array(static_cast<std::uint32_t>(layer.segments.size()));
    for (const Segment& segment : layer.segments) {
      pack.pack_array(3);
      pack.pack(segment.name);
      pack.pack_int64(segment.heads);
      pack.pack_int64(segment.channels);
    }
    put(pack, "group", layer.group);
    put(pack, "window", layer.window);
    put(pack, "shares", layer.shares);
  }
}

void put(Packer& pack, const SegmentLayout& part) {
  pack.pack_map(part.scale ? 11 : 10);
  put(pack, "dtype", std::string(name_of(part.dtype)));
  put(pack, "heads", part.heads);
  put(pack, "channels", part.channels);
  put(pack, "offset", part.offset);
  put(pack, "block_stride", part.block_stride);
  put(pack, "token_stride", part.token_stride);
  put(pack, "head_stride", part.head_stride);
  put(pack, "inner_stride", part.inner_stride);
  put(pack, "pack", part.pack);
  put(pack, "outer_stride", part.outer_stride);
  if (!part.scale) return;
  key(pack, "scale");
  pack.pack_map(1);
  key(pack, "values");
  pack.pack_array(static_cast<std::uint32_t>(part.scale->values.size()));
  for (const double value : part.scale->values) pack.pack_double(value);
}

void put(Packer& pack, const LayerGroup& group) {
  pack.pack_map(3);
  key(pack, "layers");
  pack.pack_array(static_cast<std::uint32_t>(group.layers.size()));
  for (const std::int64_t layer : group.layers) pack.pack_int64(layer);
  put(pack, "num_blocks", group.blocks);
  key(pack, "layout");
  pack.pack_map(4);
  put(pack, "name", group.layout.name);
  put(pack, "block_size", group.layout.block_size);
  key(pack, "segments");
  pack.pack_map(static_cast<std::uint32_t>(group.layout.segments.size()));
  for (const auto& [name, part] : group.layout.segments) {
    pack.pack(name);
    put(pack, part);
  }
  key(pack, "shared");
  if (group.layout.shared) {
    pack.pack_true();
  } else {
    pack.pack_false();
  }
}

Bytes taken(const msgpack::sbuffer& buffer) {
  const auto* first = reinterpret_cast<const std::uint8_t*>(buffer.data());
  return {first, first + buffer.size()};
}

Bytes alone(const char* type) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  pack.pack_map(1);
  put(pack, "type", std::string(type));
  return taken(buffer);
}

}  // namespace

Bytes encode(const Description& of) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  // Fields that an older minor version does not know are left out where they are empty.
  pack.pack_map(15 + !of.instance_shards.empty() + (of.device != "cpu") + !of.fingerprint.empty() +
                !of.sockets.empty());
  put(pack, "type", std::string("description"));
  put(pack, "role", std::string(name_of(of.role)));
  put(pack, "instance", of.instance);
  put(pack, "pid", of.pid);
  put(pack, "host", of.host);
  key(pack, "spec");
  put(pack, of.spec);
  key(pack, "shard");
  put(pack, of.shard);
  key(pack, "layers");
  pack.pack_array(static_cast<std::uint32_t>(of.layers.size()));
  for (const LayerGroup& group : of.layers) put(pack, group);
  put(pack, "worker_address", of.worker_address);
  put(pack, "engine", of.engine);
  put(pack, "slot_bytes", of.slot_bytes);
  put(pack, "heartbeat_interval_ms", of.heartbeat_interval_ms);
  put(pack, "heartbeat_timeout_ms", of.heartbeat_timeout_ms);
  put(pack, "lease_ms", of.lease_ms);
  put(pack, "rank", of.rank);
  if (!of.instance_shards.empty()) {
    key(pack, "instance_shards");
    pack.pack_array(static_cast<std::uint32_t>(of.instance_shards.size()));
    for (const Shard& shard : of.instance_shards) put(pack, shard);
  }
  if (of.device != "cpu") put(pack, "device", of.device);
  if (!of.fingerprint.empty()) {
    key(pack, "fingerprint");
    pack.pack(of.fingerprint);
  }
  if (!of.sockets.empty()) {
    key(pack, "sockets");
    pack.pack(of.sockets);
  }
  return taken(buffer);
}

Bytes encode_accept() {
  return alone("accept");
}
Bytes encode_ready() {
  return alone("ready");
}

Bytes encode_refusal(const std::string& field, const std::string& mine, const std::string& theirs,
                     const std::string& why) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  pack.pack_map(5);
  put(pack, "type", std::string("refusal"));
  put(pack, "field", field);
  put(pack, "mine", mine);
  put(pack, "theirs", theirs);
  put(pack, "why", why);
  return taken(buffer);
}

Bytes encode_streaming(bool unix_sockets, std::int64_t count) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  pack.pack_map(3);
  put(pack, "type", std::string("streaming"));
  put(pack, "kind", std::string(unix_sockets ? "unix" : "tcp"));
  put(pack, "count", count);
  return taken(buffer);
}

Bytes encode_bye(const std::string& reason) {
  msgpack::sbuffer buffer;
  Packer pack(buffer);
  pack.pack_map(2);
  put(pack, "type", std::string("bye"));
  put(pack, "reason", reason);
  return taken(buffer);
}

Status decode(const std::uint8_t* data, std::size_t size, Message* out) {
  try {
    std::size_t used = 0;
    const msgpack::object_handle handle =
        msgpack::unpack(reinterpret_cast<const char*>(data), size, used, nullptr, nullptr,
                        msgpack::unpack_limit(kMostItems, kMostItems, kMostBytes, kMostBytes, 0, kMostDepth));
    if (used != size) fail("bytes after the message");
    Fields fields(handle.get(), "");
    const std::string type = fields.text("type");
    *out = {};
    if (type == "description") {
      out->kind = MessageKind::kDescription;
      out->description = description(fields);
    } else if (type == "accept") {
      out->kind = MessageKind::kAccept;
    } else if (type == "ready") {
      out->kind = MessageKind::kReady;
    } else if (type == "refusal") {
      out->kind = MessageKind::kRefusal;
      out->field = fields.text("field");
      out->mine = fields.text("mine");
      out->theirs = fields.text("theirs");
      out->why = fields.text("why", "");
    } else if (type == "streaming") {
      out->kind = MessageKind::kStreaming;
      const std::string kind = fields.text("kind");
      out->unix_sockets = kind == "unix";
      out->count = fields.integer("count");
      if ((kind != "unix" && kind != "tcp") || out->count < 1 || out->count > kMostStreams) fail("streaming " + kind);
    } else if (type == "bye") {
      out->kind = MessageKind::kBye;
      out->reason = fields.text("reason", "");
    } else {
      fail("type " + type + " is not known");
    }
    fields.end();
    return type == "description" ? out->description.check() : Status();
  } catch (const Malformed& found) {
    return Status::error(Code::kMalformed, found.text);
  } catch (const std::exception& found) {
    return Status::error(Code::kMalformed, found.what());
  }
}

}  // namespace hetkv::control
