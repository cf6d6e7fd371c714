// The wire codec for tests and tools: messages as dicts of the fields of wire/message.h. Errors are returned, not
// raised, so that a test sees the code and the text.
#include <algorithm>

#include "bind.h"
#include "engine/window_key.h"
#include "remap/checksum.h"
#include "wire/message.h"

namespace {

using namespace hetkv;
using namespace hetkv::engine;
namespace wire = hetkv::wire;

template <std::size_t N>
std::array<std::uint8_t, N> array_of(const std::string& bytes, const char* what) {
  if (bytes.size() != N) {
    throw py::value_error(std::string(what) + " has " + std::to_string(bytes.size()) + " bytes, not " +
                          std::to_string(N));
  }
  std::array<std::uint8_t, N> out{};
  std::copy(bytes.begin(), bytes.end(), out.begin());
  return out;
}

wire::SipKey key_of(const py::bytes& key) {
  return array_of<16>(key, "key");
}

template <class Range>
py::bytes bytes_of(const Range& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

const std::uint8_t* data_of(std::string_view message) {
  return reinterpret_cast<const std::uint8_t*>(message.data());
}

template <class T>
T field(const py::dict& fields, const char* name) {
  return fields[name].cast<T>();
}

wire::Prelude prelude_of(int type, std::uint64_t sequence, const py::bytes& request, std::uint64_t epoch) {
  wire::Prelude prelude;
  prelude.type = static_cast<wire::Type>(type);
  prelude.sequence = sequence;
  prelude.request = array_of<16>(request, "request_id");
  prelude.epoch = epoch;
  return prelude;
}

// One pair of conversions a body; the overload is chosen by the body's type.
void from_dict(const py::dict& fields, wire::Frame* body) {
  body->group = field<std::uint16_t>(fields, "group");
  body->segments = field<std::uint16_t>(fields, "segments");
  body->layer = field<std::uint32_t>(fields, "layer");
  body->head_start = field<std::uint32_t>(fields, "head_start");
  body->head_stop = field<std::uint32_t>(fields, "head_stop");
  body->token_start = field<std::uint64_t>(fields, "token_start");
  body->token_stop = field<std::uint64_t>(fields, "token_stop");
  body->dtypes = field<std::array<std::uint8_t, wire::kMaxSegments>>(fields, "dtypes");
  body->scale_encoding = field<std::uint8_t>(fields, "scale_encoding");
  body->codec = field<std::uint8_t>(fields, "codec");
  body->channels = field<std::array<std::uint32_t, wire::kMaxSegments>>(fields, "channels");
  body->slot = field<std::uint32_t>(fields, "slot");
  body->generation = field<std::uint32_t>(fields, "generation");
  body->payload_length = field<std::uint64_t>(fields, "payload_length");
  body->checksum = field<std::uint64_t>(fields, "checksum");
  body->saturated = field<std::uint64_t>(fields, "saturated");
}

py::dict to_dict(const wire::Frame& body) {
  using namespace py::literals;
  return py::dict(
      "group"_a = body.group, "segments"_a = body.segments, "layer"_a = body.layer, "head_start"_a = body.head_start,
      "head_stop"_a = body.head_stop, "token_start"_a = body.token_start, "token_stop"_a = body.token_stop,
      "dtypes"_a = py::tuple(py::cast(body.dtypes)), "scale_encoding"_a = body.scale_encoding, "codec"_a = body.codec,
      "channels"_a = py::tuple(py::cast(body.channels)), "slot"_a = body.slot, "generation"_a = body.generation,
      "payload_length"_a = body.payload_length, "checksum"_a = body.checksum, "saturated"_a = body.saturated);
}

// A record is the dict of its frame, with the request, the epoch and the payload's offset.
void from_dict(const py::dict& fields, wire::Bundle* body) {
  body->slot = field<std::uint32_t>(fields, "slot");
  body->generation = field<std::uint32_t>(fields, "generation");
  for (const auto& item : field<std::vector<py::dict>>(fields, "records")) {
    wire::Record& record = body->records.emplace_back();
    record.request = array_of<16>(field<py::bytes>(item, "request_id"), "request_id");
    record.epoch = field<std::uint64_t>(item, "epoch");
    from_dict(item["frame"].cast<py::dict>(), &record.frame);
    record.payload_offset = field<std::uint64_t>(item, "payload_offset");
  }
}

py::dict to_dict(const wire::Bundle& body) {
  using namespace py::literals;
  py::list records;
  for (const auto& record : body.records) {
    records.append(py::dict("request_id"_a = bytes_of(record.request), "epoch"_a = record.epoch,
                            "frame"_a = to_dict(record.frame), "payload_offset"_a = record.payload_offset));
  }
  return py::dict("slot"_a = body.slot, "generation"_a = body.generation, "records"_a = py::tuple(records));
}

using Pairs = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

void from_dict(const py::dict& fields, wire::Ticket* body) {
  body->lease_ms = field<std::uint32_t>(fields, "lease_ms");
  if (fields.contains("content")) body->content = array_of<16>(field<py::bytes>(fields, "content"), "content");
  for (const auto& [start, stop] : field<Pairs>(fields, "groups")) body->groups.push_back({start, stop});
}

py::dict to_dict(const wire::Ticket& body) {
  Pairs groups;
  for (const auto& range : body.groups) groups.emplace_back(range.start, range.stop);
  py::dict out;
  out["lease_ms"] = body.lease_ms;
  if (body.content) out["content"] = bytes_of(*body.content);
  out["groups"] = py::tuple(py::cast(groups));
  return out;
}

void from_dict(const py::dict& fields, wire::Grant* body) {
  for (const auto& item : field<std::vector<py::dict>>(fields, "slots")) {
    const std::string rkey = field<py::bytes>(item, "rkey");
    body->slots.push_back({field<std::uint32_t>(item, "slot"),
                           field<std::uint32_t>(item, "generation"),
                           field<std::uint64_t>(item, "address"),
                           field<std::uint64_t>(item, "num_bytes"),
                           {rkey.begin(), rkey.end()}});
  }
}

py::dict to_dict(const wire::Grant& body) {
  using namespace py::literals;
  py::list slots;
  for (const auto& slot : body.slots) {
    slots.append(py::dict("slot"_a = slot.slot, "generation"_a = slot.generation, "address"_a = slot.address,
                          "num_bytes"_a = slot.bytes, "rkey"_a = bytes_of(slot.rkey)));
  }
  return py::dict("slots"_a = py::tuple(slots));
}

void from_dict(const py::dict& fields, wire::Release* body) {
  for (const auto& [slot, generation] : field<std::vector<std::pair<std::uint32_t, std::uint32_t>>>(fields, "slots")) {
    body->slots.push_back({slot, generation});
  }
}

py::dict to_dict(const wire::Release& body) {
  Pairs slots;
  for (const auto& slot : body.slots) slots.emplace_back(slot.slot, slot.generation);
  py::dict out;
  out["slots"] = py::tuple(py::cast(slots));
  return out;
}

void from_dict(const py::dict& fields, wire::Done* body) {
  *body = {field<std::uint64_t>(fields, "frames"), field<std::uint64_t>(fields, "payload_bytes")};
}

py::dict to_dict(const wire::Done& body) {
  using namespace py::literals;
  return py::dict("frames"_a = body.frames, "payload_bytes"_a = body.payload_bytes);
}

void from_dict(const py::dict& fields, wire::Abort* body) {
  *body = {static_cast<Code>(field<std::uint8_t>(fields, "code")), field<std::string>(fields, "reason")};
}

py::dict to_dict(const wire::Abort& body) {
  using namespace py::literals;
  return py::dict("code"_a = static_cast<int>(body.code), "reason"_a = body.reason);
}

void from_dict(const py::dict& fields, wire::Heartbeat* body) {
  *body = {field<std::uint64_t>(fields, "clock_ns")};
}

py::dict to_dict(const wire::Heartbeat& body) {
  using namespace py::literals;
  return py::dict("clock_ns"_a = body.clock_ns);
}

template <class Body>
std::vector<std::uint8_t> encode_as(const wire::Prelude& prelude, const py::dict& fields, const wire::SipKey& key) {
  Body body;
  from_dict(fields, &body);
  std::vector<std::uint8_t> out;
  wire::encode(prelude, body, key, out);
  return out;
}

std::vector<std::uint8_t> encode_any(const wire::Prelude& prelude, const py::dict& fields, const wire::SipKey& key) {
  switch (prelude.type) {
    case wire::Type::kFrame:
      return encode_as<wire::Frame>(prelude, fields, key);
    case wire::Type::kBundle:
      return encode_as<wire::Bundle>(prelude, fields, key);
    case wire::Type::kTicket:
    case wire::Type::kBoundTicket:
      return encode_as<wire::Ticket>(prelude, fields, key);
    case wire::Type::kGrant:
      return encode_as<wire::Grant>(prelude, fields, key);
    case wire::Type::kRelease:
    case wire::Type::kRecall:
      return encode_as<wire::Release>(prelude, fields, key);
    case wire::Type::kDone:
      return encode_as<wire::Done>(prelude, fields, key);
    case wire::Type::kAbort:
      return encode_as<wire::Abort>(prelude, fields, key);
    case wire::Type::kHeartbeat:
      return encode_as<wire::Heartbeat>(prelude, fields, key);
    case wire::Type::kWant:
    case wire::Type::kHostOnly:
    case wire::Type::kBye:
      break;
  }
  std::vector<std::uint8_t> out;
  wire::encode(prelude, key, out);
  return out;
}

template <class Body>
Status decode_as(std::string_view message, py::object* fields) {
  Body body;
  Status status = wire::decode(data_of(message), message.size(), &body);
  if (status.ok()) *fields = to_dict(body);
  return status;
}

Status decode_any(wire::Type type, std::string_view message, py::object* fields) {
  switch (type) {
    case wire::Type::kFrame:
      return decode_as<wire::Frame>(message, fields);
    case wire::Type::kBundle:
      return decode_as<wire::Bundle>(message, fields);
    case wire::Type::kTicket:
    case wire::Type::kBoundTicket:
      return decode_as<wire::Ticket>(message, fields);
    case wire::Type::kGrant:
      return decode_as<wire::Grant>(message, fields);
    case wire::Type::kRelease:
    case wire::Type::kRecall:
      return decode_as<wire::Release>(message, fields);
    case wire::Type::kDone:
      return decode_as<wire::Done>(message, fields);
    case wire::Type::kAbort:
      return decode_as<wire::Abort>(message, fields);
    case wire::Type::kHeartbeat:
      return decode_as<wire::Heartbeat>(message, fields);
    case wire::Type::kWant:
    case wire::Type::kHostOnly:
    case wire::Type::kBye:
      break;
  }
  return {};
}

py::bytes wire_encode(int type, std::uint64_t sequence, const py::bytes& request_id, std::uint64_t epoch,
                      const py::dict& fields, const py::bytes& key) {
  return bytes_of(encode_any(prelude_of(type, sequence, request_id, epoch), fields, key_of(key)));
}

py::bytes window_key_encode(const py::dict& fields) {
  DeviceWindowKey key;
  key.process = array_of<16>(field<py::bytes>(fields, "process"), "process");
  key.backend = field<std::string>(fields, "backend");
  key.device = field<std::uint32_t>(fields, "device");
  const auto handle = array_of<sizeof key.handle.bytes>(field<py::bytes>(fields, "handle"), "handle");
  std::copy(handle.begin(), handle.end(), key.handle.bytes);
  key.handle.offset = field<std::uint64_t>(fields, "offset");
  key.handle.length = field<std::uint64_t>(fields, "length");
  const std::string ucx = field<py::bytes>(fields, "ucx");
  key.ucx.assign(ucx.begin(), ucx.end());
  return bytes_of(encode_key(key));
}

py::tuple window_key_decode(const py::bytes& data) {
  using namespace py::literals;
  const std::string_view view = data;
  DeviceWindowKey key;
  const Status status = decode_key({view.begin(), view.end()}, &key);
  if (!status.ok()) return py::make_tuple(static_cast<int>(status.code), status.detail, py::none());
  const std::string_view handle(reinterpret_cast<const char*>(key.handle.bytes), sizeof key.handle.bytes);
  return py::make_tuple(0, "",
                        py::dict("process"_a = bytes_of(key.process), "backend"_a = key.backend,
                                 "device"_a = key.device, "handle"_a = bytes_of(handle), "offset"_a = key.handle.offset,
                                 "length"_a = key.handle.length, "ucx"_a = bytes_of(key.ucx)));
}

py::dict wire_open(const py::bytes& message, const py::bytes& key) {
  // An exact copy on the heap, so that a sanitizer sees a read past the end.
  const std::string_view view = message;
  const std::vector<std::uint8_t> copy(view.begin(), view.end());
  const std::string_view exact(reinterpret_cast<const char*>(copy.data()), copy.size());
  wire::Prelude prelude;
  py::object fields = py::none();
  Status status = wire::open(copy.data(), copy.size(), key_of(key), &prelude);
  py::dict out;
  if (status.ok()) {
    status = decode_any(prelude.type, exact, &fields);
    out["type"] = static_cast<int>(prelude.type);
    out["sequence"] = prelude.sequence;
    out["request_id"] = bytes_of(prelude.request);
    out["epoch"] = prelude.epoch;
  }
  out["body"] = fields;
  out["code"] = static_cast<int>(status.code);
  out["detail"] = status.detail;
  return out;
}

// Runs one body decoder on bytes that open() has not seen, as a hostile caller might.
py::tuple wire_decode_unopened(int type, const py::bytes& message) {
  const std::string_view view = message;
  const std::vector<std::uint8_t> copy(view.begin(), view.end());
  py::object fields = py::none();
  const Status status =
      decode_any(static_cast<wire::Type>(type), {reinterpret_cast<const char*>(copy.data()), copy.size()}, &fields);
  return py::make_tuple(static_cast<int>(status.code), status.detail);
}

}  // namespace

void bind_wire(py::module_& m) {
  using namespace py::literals;
  m.def("wire_encode", &wire_encode, "type"_a, "sequence"_a, "request_id"_a, "epoch"_a, "fields"_a, "key"_a,
        "One whole message from a dict of its body's fields (empty for want and bye).");
  m.def("wire_open", &wire_open, "message"_a, "key"_a,
        "Opens and decodes a message: a dict with `code` (0 where it is valid), `detail`, the prelude and `body`.");
  m.def("wire_decode_unopened", &wire_decode_unopened, "type"_a, "message"_a,
        "Decodes a body without opening the message: `(code, detail)`.");
  m.def("window_key_encode", &window_key_encode, "fields"_a, "The key of a slot in device memory from its fields.");
  m.def("window_key_decode", &window_key_decode, "data"_a,
        "Its fields: `(code, detail, fields)`, None where code is not 0.");
  m.def(
      "wire_checksum_seed",
      [](const py::bytes& request_id, std::uint64_t epoch, const py::dict& fields) {
        wire::Frame frame;
        from_dict(fields, &frame);
        return wire::checksum_seed(array_of<16>(request_id, "request_id"), epoch, frame);
      },
      "request_id"_a, "epoch"_a, "fields"_a, "Seed of the payload checksum of a frame.");
  m.def(
      "wire_checksum",
      [](const py::bytes& payload, std::uint64_t seed) {
        const std::string_view view = payload;
        return hetkv::remap::checksum_cpu(view.data(), view.size(), 0, seed);
      },
      "payload"_a, "seed"_a, "Checksum of a whole payload.");
  m.def(
      "siphash24",
      [](const py::bytes& key, const py::bytes& data) {
        const std::string_view view = data;
        return wire::siphash24(key_of(key), view.data(), view.size());
      },
      "key"_a, "data"_a, "SipHash-2-4.");
}
