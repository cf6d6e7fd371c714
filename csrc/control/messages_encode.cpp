// Messages as bytes (messages.h): what this side says.
#define MSGPACK_NO_BOOST
#include <cstring>
#include <msgpack.hpp>
#include <string>

#include "control/messages.h"

namespace hetkv::control {
namespace {

using Packer = msgpack::packer<msgpack::sbuffer>;

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
    put(pack, "window", layer.sliding_window);
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

}  // namespace hetkv::control
