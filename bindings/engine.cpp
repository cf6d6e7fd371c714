// Binds engine/: Sender, Receiver, their settings and events.
#include <pybind11/functional.h>

#include <optional>
#include <tuple>

#include "bind.h"
#include "engine/device_mover.h"
#include "engine/receiver.h"
#include "engine/sender.h"
#include "transport/streams.h"
#include "transport/ucx.h"

namespace hetkv {
using namespace engine;
namespace {

std::vector<std::uint8_t> to_vector(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return {view.begin(), view.end()};
}

template <std::size_t N>
std::array<std::uint8_t, N> to_array(const py::bytes& bytes, const char* what) {
  const std::string_view view = bytes;
  if (view.size() != N) throw py::value_error(std::string(what) + " must be " + std::to_string(N) + " bytes");
  std::array<std::uint8_t, N> out{};
  std::copy(view.begin(), view.end(), out.begin());
  return out;
}

// Block ids of one cache group: one copy, whatever their number.
std::vector<std::int32_t> to_blocks(const py::buffer& ids) {
  const py::buffer_info info = ids.request();
  if (info.ndim != 1 || !info.item_type_is_equivalent_to<std::int32_t>() ||
      (info.size > 1 && info.strides[0] != info.itemsize)) {
    throw py::value_error("block ids must be a contiguous buffer of int32");
  }
  const auto* first = static_cast<const std::int32_t*>(info.ptr);
  return {first, first + info.size};
}

std::vector<std::vector<std::int32_t>> to_tables(const std::vector<py::buffer>& groups) {
  std::vector<std::vector<std::int32_t>> out;
  for (const auto& ids : groups) out.push_back(to_blocks(ids));
  return out;
}

std::vector<wire::TokenRange> to_ranges(const std::vector<std::pair<std::uint64_t, std::uint64_t>>& pairs) {
  std::vector<wire::TokenRange> out;
  for (const auto& [start, stop] : pairs) out.push_back({start, stop});
  return out;
}

std::optional<wire::Content> to_content(const std::optional<py::bytes>& content) {
  if (!content) return std::nullopt;
  return to_array<16>(*content, "content");
}

constexpr std::pair<const char*, transport::Cipher> kCiphers[] = {
    {"aes-256-gcm", transport::Cipher::kAes256Gcm},
    {"chacha20-poly1305", transport::Cipher::kChaCha20Poly1305},
};

transport::Cipher to_cipher(const std::string& name) {
  for (const auto& [known, cipher] : kCiphers) {
    if (name == known) return cipher;
  }
  check(Status::error(Code::kInvalid, "cipher '" + name + "' is not known"));
  return transport::Cipher::kNone;
}

std::vector<std::string> ciphers() {
  std::vector<std::string> out;
  for (const auto& [name, cipher] : kCiphers) {
    if (transport::has_cipher(cipher)) out.emplace_back(name);
  }
  return out;
}

// (descriptor, send key, receive key, cipher or "") of each socket.
using Streams = std::vector<std::tuple<int, py::bytes, py::bytes, std::string>>;

std::vector<transport::StreamConfig> to_streams(const Streams& streams) {
  std::vector<transport::StreamConfig> out;
  for (const auto& [descriptor, send_key, receive_key, cipher] : streams) {
    transport::StreamConfig& config = out.emplace_back();
    config.descriptor = descriptor;
    if (cipher.empty()) {
      config.send_key = to_array<16>(send_key, "send_key");
      config.receive_key = to_array<16>(receive_key, "receive_key");
      continue;
    }
    config.cipher = to_cipher(cipher);
    config.send_seal = to_array<32>(send_key, "send_key");
    config.receive_seal = to_array<32>(receive_key, "receive_key");
  }
  return out;
}

// Event as a tuple (kind, handle, link, layer, code, detail): the dispatcher thread of hetkv/transport/sender.py
// unpacks it.
py::tuple to_tuple(const Event& event) {
  return py::make_tuple(name_of(event.kind), event.handle, event.link, event.layer, static_cast<int>(event.status.code),
                        event.status.detail);
}

// Python collects what a forked child has of its parent's engines; these are the parent's to end.
struct DeleteWhereMade {
  template <typename E>
  void operator()(E* engine) const {
    if (engine->made_here()) delete engine;
  }
};

template <typename E>
using EngineClass = py::class_<E, std::unique_ptr<E, DeleteWhereMade>>;

template <typename E>
std::unique_ptr<E, DeleteWhereMade> make_engine(const EngineConfig& config, std::shared_ptr<Device> device) {
  const py::gil_scoped_release release;  // here and not around the constructor, which registers the new object
  Parts parts;
  parts.clock = system_clock();
  std::unique_ptr<transport::Rma> rma;
  if (!config.rma.empty()) check(transport::open_rma(config.rma, &rma));
  parts.transport = std::make_unique<transport::StreamTransport>(parts.clock, std::move(rma));
  if (device != nullptr) {
    check(DeviceMover::create(device, config, parts.clock, &parts.mover));
  } else {
    parts.mover = std::make_unique<CpuMover>(config.threads, parts.clock);
  }
  parts.device = std::move(device);
  return std::unique_ptr<E, DeleteWhereMade>(new E(config, std::move(parts)));
}

template <typename E>
void bind_common(EngineClass<E>& type) {
  type.def(
          "start", [](E& self) { check(self.start()); }, py::call_guard<py::gil_scoped_release>())
      .def("stop", &E::stop, py::call_guard<py::gil_scoped_release>(),
           "Ends all links and requests and joins the progress thread.")
      .def_property_readonly("address",
                             [](const E& self) {
                               const auto& at = self.address();
                               return py::bytes(reinterpret_cast<const char*>(at.data()), at.size());
                             })
      .def(
          "add_link",
          [](E& self, LinkConfig config) {
            std::uint32_t id = 0;
            check(self.add_link(std::move(config), &id));
            return id;
          },
          py::arg("config"), py::call_guard<py::gil_scoped_release>(), "Number of the new link on this side.")
      .def("activate_link", &E::activate_link, py::arg("link"), py::call_guard<py::gil_scoped_release>())
      .def(
          "drop_link",
          [](E& self, std::uint32_t link, int code, std::string reason) {
            self.drop_link(link, Status::error(static_cast<Code>(code), std::move(reason)));
          },
          py::arg("link"), py::arg("code"), py::arg("reason"), py::call_guard<py::gil_scoped_release>())
      .def(
          "wait_events",
          [](E& self) {
            std::vector<Event> events;
            {
              py::gil_scoped_release release;
              events = self.events().wait();
            }
            py::list out;
            for (const auto& event : events) out.append(to_tuple(event));
            return out;
          },
          "Blocks until something happened; an empty list means that the engine has stopped.")
      .def(
          "take_ended", [](E& self) { return self.outcomes().take_ended(); },
          "Handles of the requests that have ended since the last call.")
      .def_property_readonly("open_requests", [](E& self) { return self.outcomes().size(); })
      .def("take_trace",
           [](E& self) {
             py::list out;
             for (const auto& span : self.trace().take()) {
               out.append(py::make_tuple(name_of(span.kind), span.handle, span.layer, span.start_ns, span.stop_ns,
                                         span.bytes));
             }
             return out;
           })
      .def("stats",
           [](E& self) {
             const EngineStats& at = self.stats();
             py::dict out;
             out["frames"] = at.frames.load();
             out["bundles"] = at.bundles.load();
             out["payload_bytes"] = at.payload_bytes.load();
             out["saturated"] = at.saturated.load();
             out["direct_frames"] = at.direct_frames.load();
             out["device_frames"] = at.device_frames.load();
             out["stale_frames"] = at.stale_frames.load();
             out["failed_requests"] = at.failed_requests.load();
             out["quarantined_slots"] = at.quarantined_slots.load();
             out["wakeups"] = at.wakeups.load();
             out["open_requests"] = self.outcomes().size();
             out["pending_tickets"] = at.pending_tickets.load();
             out["granted_slots"] = at.granted_slots.load();
             return out;
           })
      .def(
          "inject", [](E& self, std::uint32_t link, const py::bytes& bytes) { self.inject(link, to_vector(bytes)); },
          py::arg("link"), py::arg("message"), "For tests: sends bytes as one message of the link.")
      .def("next_sequence", &E::next_sequence, py::arg("link"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_engine(py::module_& m) {
  m.attr("RMA_TRANSPORTS") = transport::kRmaTransports;
  m.def("ciphers", &ciphers, "Ciphers that this build and CPU have, by the names of docs/wire-codes.md; best first.");
  m.def(
      "load_ucx", [](const std::string& path) { check(transport::load_ucx(path.c_str())); }, py::arg("path"),
      "Loads the `libucp` at `path`, for engines whose configuration names transports in `rma`.");

  py::class_<EngineConfig>(m, "EngineConfig")
      .def(py::init<>())
      .def_readwrite("slot_bytes", &EngineConfig::slot_bytes)
      .def_readwrite("window_bytes", &EngineConfig::window_bytes)
      .def_readwrite("staging_slots", &EngineConfig::staging_slots)
      .def_readwrite("max_slots_per_link", &EngineConfig::max_slots_per_link)
      .def_readwrite("threads", &EngineConfig::threads)
      .def_readwrite("max_blocks", &EngineConfig::max_blocks)
      .def_readwrite("spin_us", &EngineConfig::spin_us)
      .def_readwrite("heartbeat_ms", &EngineConfig::heartbeat_ms)
      .def_readwrite("peer_timeout_ms", &EngineConfig::peer_timeout_ms)
      .def_readwrite("copy_engine", &EngineConfig::copy_engine)
      .def_readwrite("high_priority", &EngineConfig::high_priority)
      .def_readwrite("verify_bytes", &EngineConfig::verify_bytes)
      .def_readwrite("isolate_peers", &EngineConfig::isolate_peers)
      .def_readwrite("device_scales", &EngineConfig::device_scales)
      .def_readwrite("direct", &EngineConfig::direct)
      .def_readwrite("bundle_frames", &EngineConfig::bundle_frames)
      .def_readwrite("layer_groups", &EngineConfig::layer_groups)
      .def_readwrite("trace", &EngineConfig::trace)
      .def_readwrite("rma", &EngineConfig::rma);

  py::class_<SegmentPlan>(m, "SegmentPlan")
      .def(py::init([](const SegmentMap& pool, std::int32_t first_head, std::int32_t channels, int wire_dtype,
                       std::vector<float> multipliers, const std::optional<SegmentMap>& pool_scales,
                       std::int32_t channels_per_scale, std::int32_t wire_scales, bool joint, float largest,
                       bool carried) {
             return SegmentPlan{pool,
                                first_head,
                                channels,
                                static_cast<DType>(wire_dtype),
                                std::move(multipliers),
                                {pool_scales.value_or(SegmentMap{}), channels_per_scale},
                                wire_scales,
                                joint,
                                largest,
                                carried};
           }),
           py::arg("pool"), py::arg("first_head"), py::arg("channels"), py::arg("wire_dtype"), py::arg("multipliers"),
           py::kw_only(), py::arg("pool_scales") = py::none(), py::arg("channels_per_scale") = 0,
           py::arg("wire_scales") = -1, py::arg("joint") = false, py::arg("largest") = 0.0f,
           py::arg("carried") = false);

  py::class_<ScaleFill>(m, "ScaleFill")
      .def(py::init([](const SegmentMap& pool, std::int32_t first_head, std::int32_t groups,
                       std::vector<float> values) { return ScaleFill{pool, first_head, groups, std::move(values)}; }),
           py::arg("pool"), py::arg("first_head"), py::arg("groups"), py::arg("values"));

  py::class_<LayerPlan>(m, "LayerPlan")
      .def(py::init([](std::uint32_t layer, std::uint16_t group, std::uint32_t head_start, std::uint32_t head_stop,
                       std::vector<SegmentPlan> segments, std::vector<ScaleFill> fills, std::uint8_t scale_encoding) {
             return LayerPlan{layer,         group, head_start, head_stop, std::move(segments), std::move(fills),
                              scale_encoding};
           }),
           py::arg("layer"), py::arg("group"), py::arg("head_start"), py::arg("head_stop"), py::arg("segments"),
           py::arg("fills") = std::vector<ScaleFill>(), py::arg("scale_encoding") = 0)
      .def("payload_bytes", &LayerPlan::payload_bytes, py::arg("tokens"));

  py::class_<LinkConfig>(m, "LinkConfig")
      .def(py::init([](const py::bytes& address, std::uint64_t number, std::uint8_t minor, const py::bytes& send_key,
                       const py::bytes& receive_key, std::string name, std::string instance,
                       std::uint32_t instance_links, std::vector<LayerPlan> plans, bool device_windows,
                       bool rdma_windows, const Streams& streams, int coded_values, bool always_code, int accept,
                       int threads, std::uint32_t frame_ms) {
             return LinkConfig{
                 to_vector(address),
                 number,
                 minor,
                 to_array<16>(send_key, "send_key"),
                 to_array<16>(receive_key, "receive_key"),
                 std::move(name),
                 std::move(instance),
                 instance_links,
                 device_windows,
                 rdma_windows,
                 std::move(plans),
                 to_streams(streams),
                 {static_cast<codec::Values>(coded_values), always_code, static_cast<codec::ValuesMask>(accept)},
                 threads,
                 frame_ms};
           }),
           py::kw_only(), py::arg("address"), py::arg("number"), py::arg("minor"), py::arg("send_key"),
           py::arg("receive_key"), py::arg("name"), py::arg("instance"), py::arg("instance_links"), py::arg("plans"),
           py::arg("device_windows") = false, py::arg("rdma_windows") = false, py::arg("streams"),
           py::arg("coded_values") = 0, py::arg("always_code") = false, py::arg("accept") = 0, py::arg("threads") = 0,
           py::arg("frame_ms") = 0,
           "`streams`: (descriptor, send key, receive key, cipher) of each; the descriptors are duplicated. Keys have "
           "16\n"
           "bytes, and 32 where the cipher is not empty: see `ciphers`. `coded_values`: what payloads are mostly, 1 "
           "bfloat16,\n"
           "2 float16, 3 codes of four bits, where a sender may code them (0: it may not), by measured rates or "
           "`always`;\n"
           "`accept`: bit v: coded ones of values v may come.");

  py::class_<SendBatch, std::shared_ptr<SendBatch>>(m, "SendBatch")
      .def(py::init([](std::vector<std::uint64_t> handles,
                       const std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>>& tokens) {
             SendBatch batch{std::move(handles), {}};
             for (const auto& group : tokens) {
               if (group.size() != batch.handles.size()) throw py::value_error("one range of tokens for each handle");
               batch.tokens.push_back(to_ranges(group));
             }
             return batch;
           }),
           py::arg("handles"), py::arg("tokens"), "`tokens`: for each cache group one range a handle.");

  EngineClass<Sender> sender(m, "Sender");
  sender.def(py::init(&make_engine<Sender>), py::arg("config"), py::arg("device") = nullptr);
  bind_common(sender);
  sender
      .def(
          "submit",
          [](Sender& self, const py::bytes& id, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& tokens,
             const std::vector<py::buffer>& blocks, std::uint64_t hold_ms, const std::optional<py::bytes>& content,
             std::int32_t priority) {
            std::shared_ptr<Outcome> outcome;
            check(self.submit({to_array<16>(id, "request id"), to_ranges(tokens), to_tables(blocks), hold_ms,
                               to_content(content), priority},
                              &outcome));
            return outcome;
          },
          py::arg("id"), py::arg("tokens"), py::arg("blocks"), py::arg("hold_ms"), py::arg("content") = py::none(),
          py::arg("priority") = 0)
      .def(
          "extend",
          [](Sender& self, std::uint64_t handle, std::size_t group, const py::buffer& blocks) {
            self.extend(handle, group, to_blocks(blocks));
          },
          py::arg("handle"), py::arg("group"), py::arg("blocks"))
      .def(
          "send_layer",
          [](Sender& self, std::uint64_t handle, std::uint32_t layer, std::uint64_t start, std::uint64_t stop,
             std::optional<std::uint64_t> stream) {
            if (!stream) return self.send_layer(handle, layer, {start, stop});
            check(self.send_layer(handle, layer, {start, stop}, reinterpret_cast<void*>(*stream)));
          },
          py::arg("handle"), py::arg("layer"), py::arg("start"), py::arg("stop"), py::arg("stream") = py::none(),
          "`stream`: of the pool's device; the layer is in the pool once its present work has run. None: it is there "
          "now.")
      .def(
          "send_batch",
          [](Sender& self, std::shared_ptr<SendBatch> batch, std::int32_t layer, std::optional<std::uint64_t> stream) {
            if (!stream) return self.send_batch(std::move(batch), layer);
            check(self.send_batch(std::move(batch), layer, reinterpret_cast<void*>(*stream)));
          },
          py::arg("batch"), py::arg("layer"), py::arg("stream") = py::none(),
          "`send_layer` for the tokens that the batch has of a layer, or with -1 of each layer of the pool.")
      .def(
          "path", [](Sender& self, std::uint32_t link) { return name_of(self.path(link)); }, py::arg("link"),
          py::call_guard<py::gil_scoped_release>(), "How payloads get to the peer; None: no slot of it is known yet.")
      .def("abort", &Sender::abort, py::arg("handle"), py::arg("reason"))
      .def(
          "reject",
          [](Sender& self, const py::bytes& id, std::string reason) {
            self.reject(to_array<16>(id, "request id"), std::move(reason));
          },
          py::arg("id"), py::arg("reason"), "The id will not be sent again.");

  EngineClass<Receiver> receiver(m, "Receiver");
  receiver.def(py::init(&make_engine<Receiver>), py::arg("config"), py::arg("device") = nullptr);
  bind_common(receiver);
  receiver
      .def(
          "receive",
          [](Receiver& self, const py::bytes& id, const std::vector<std::pair<std::uint64_t, std::uint64_t>>& want,
             const std::vector<py::buffer>& blocks, std::vector<std::uint32_t> links, std::uint32_t lease_ms,
             const std::optional<py::bytes>& content) {
            std::shared_ptr<Outcome> outcome;
            check(self.receive({to_array<16>(id, "request id"), to_ranges(want), to_tables(blocks), std::move(links),
                                lease_ms, to_content(content)},
                               &outcome));
            return outcome;
          },
          py::arg("id"), py::arg("want"), py::arg("blocks"), py::arg("links"), py::arg("lease_ms"),
          py::arg("content") = py::none())
      .def("abort", &Receiver::abort, py::arg("handle"), py::arg("reason"))
      .def("epoch", &Receiver::epoch, py::arg("handle"), py::call_guard<py::gil_scoped_release>(),
           "For tests: the epoch of a request's ticket; 0 where it has ended.")
      .def(
          "wait_stream",
          [](Receiver& self, Outcome& outcome, std::int32_t layer, std::uint64_t stream) {
            check(self.wait_stream(outcome, layer, reinterpret_cast<void*>(stream)));
          },
          py::arg("outcome"), py::arg("layer"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Makes a stream wait for a layer, or with -1 for the whole request.")
      .def("retire_link", &Receiver::retire_link, py::arg("link"));
}

}  // namespace hetkv
