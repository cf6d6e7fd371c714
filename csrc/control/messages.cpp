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
    layer.sliding_window = optional_integer(of, "window");
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
  if (const Object* separate = fields.optional("apart")) {
    if (separate->type != msgpack::type::BOOLEAN) fail(fields.path("apart"));
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

}  // namespace

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
