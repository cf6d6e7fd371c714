// Binds csrc/remap/: maps, jobs, remap, checksum. Checks what the C++ side trusts its callers with.
#include "remap/remap.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "convert.h"
#include "job.h"
#include "remap/checksum.h"
#include "remap/copy.h"
#include "remap/isa.h"

namespace hetkv {

void raise_input_error(const std::string& text) {
  py::object type = py::module_::import("hetkv.errors").attr("InputError");
  PyErr_SetString(type.ptr(), text.c_str());
  throw py::error_already_set();
}

}  // namespace hetkv

namespace {

using hetkv::require;
using hetkv::SegmentMap;
using hetkv::remap::Job;
using hetkv::remap::WireSide;
using Job = hetkv::OwnedJob;
using Side = hetkv::OwnedSide;

std::vector<std::int32_t> block_table(const py::object& blocks) {
  if (blocks.is_none()) return {};
  if (!PyObject_CheckBuffer(blocks.ptr())) {
    if (py::hasattr(blocks, "numpy")) return block_table(blocks.attr("numpy")());  // a CPU tensor
    return blocks.cast<std::vector<std::int32_t>>();
  }
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(blocks).request();
  require(info.ndim == 1 && info.itemsize == 4 && (info.format == "i" || info.format == "l") &&
              (info.size < 2 || info.strides[0] == 4),
          "block ids must be a contiguous one-dimensional int32 buffer or a list");
  const auto* first = static_cast<const std::int32_t*>(info.ptr);
  return {first, first + info.size};
}

void check_side(const Side& side, const Job& job, const char* name) {
  const SegmentMap& map = side.map;
  const std::string who = std::string(name) + ": ";
  require(map.base != 0, who + "the base address is 0");
  require(map.pack > 0, who + "pack is " + std::to_string(map.pack));
  require(map.block_size >= 0, who + "block size is " + std::to_string(map.block_size));
  require(side.first_token >= 0 && side.first_head >= 0, who + "first token and first head must not be negative");
  if (map.block_size == 0) return;
  const std::int64_t need = job.tokens == 0 ? 0 : (side.first_token + job.tokens + map.block_size - 1) / map.block_size;
  require(static_cast<std::int64_t>(side.blocks.size()) >= need,
          who + std::to_string(side.first_token + job.tokens) + " tokens need " + std::to_string(need) + " blocks of " +
              std::to_string(map.block_size) + ", got " + std::to_string(side.blocks.size()));
  const auto negative = std::find_if(side.blocks.begin(), side.blocks.end(), [](std::int32_t id) { return id < 0; });
  require(negative == side.blocks.end(), who + "a block id is negative");
}

void check_scales(const Job& job) {
  for (const Side* side : {&job.src, &job.dst}) {
    require(side->map.dtype != hetkv::DType::kUInt8, "uint8 has no scales and is never converted");
    const hetkv::remap::Scales& scales = side->scales;
    if (scales.map.base == 0) continue;
    require(scales.map.dtype == hetkv::DType::kFloat32 && scales.map.block_size == side->map.block_size,
            "scales are float32, in blocks as large as their side's");
    require(
        scales.channels_per_scale > 0 && job.channels % scales.channels_per_scale == 0,
        std::to_string(job.channels) + " channels with a scale for each " + std::to_string(scales.channels_per_scale));
  }
  const std::int32_t a = job.src.scales.channels_per_scale;
  const std::int32_t b = job.dst.scales.channels_per_scale;
  require(a == 0 || b == 0 || a % b == 0 || b % a == 0,
          "groups of " + std::to_string(a) + " and " + std::to_string(b) + " channels do not fit each other");
}

Job make_job(Side src, Side dst, std::int64_t tokens, std::int32_t heads, std::int32_t channels,
             std::vector<float> multipliers, const std::string& wire, std::uint64_t wire_offset, bool joint,
             std::uint64_t wire_scale_offset, float largest) {
  Job job{std::move(src),
          std::move(dst),
          tokens,
          heads,
          channels,
          std::move(multipliers),
          hetkv::remap::WireSide::kNone,
          wire_offset,
          joint,
          wire_scale_offset,
          largest};
  require(tokens >= 0 && heads >= 0 && channels >= 0, "tokens, heads and channels must not be negative");
  require(wire.empty() || wire == "source" || wire == "destination", "wire is 'source', 'destination' or ''");
  if (!wire.empty())
    job.wire = wire == "source" ? hetkv::remap::WireSide::kSource : hetkv::remap::WireSide::kDestination;
  require(wire_offset % 8 == 0, "wire offset " + std::to_string(wire_offset) + " is not a multiple of 8");
  require(job.multipliers.empty() || job.multipliers.size() == static_cast<std::size_t>(heads),
          std::to_string(job.multipliers.size()) + " multipliers for " + std::to_string(heads) + " heads");
  check_side(job.src, job, "source");
  check_side(job.dst, job, "destination");
  if (job.scaled()) check_scales(job);
  const bool converts = job.src.map.dtype != job.dst.map.dtype || !job.multipliers.empty();
  require(!converts || job.scaled() || (hetkv::is_float(job.src.map.dtype) && hetkv::is_float(job.dst.map.dtype)),
          "int8 and uint8 are moved, never converted: both sides need the same dtype and no multipliers");
  if (job.wire != hetkv::remap::WireSide::kNone) {
    const Side& side = job.wire == hetkv::remap::WireSide::kSource ? job.src : job.dst;
    const SegmentMap want = hetkv::canonical_map(side.map.base, tokens, channels, side.map.dtype);
    require(side.map.block_size == 0 && side.first_token == 0 && side.first_head == 0 &&
                side.map.head_stride == want.head_stride && side.map.token_stride == want.token_stride &&
                side.map.inner_stride == want.inner_stride && side.map.pack >= channels,
            "the wire side must be the canonical map of the job");
  }
  return job;
}

hetkv::DType parse_dtype(int code) {
  require(code >= 1 && code <= 9, "dtype code " + std::to_string(code) + " is not known");
  return static_cast<hetkv::DType>(code);
}

SegmentMap make_map(std::uint64_t base, std::int64_t block_stride, std::int64_t token_stride, std::int64_t head_stride,
                    std::int64_t outer_stride, std::int64_t inner_stride, std::int32_t block_size, std::int32_t pack,
                    int dtype) {
  return SegmentMap{base,         block_stride, token_stride, head_stride,       outer_stride,
                    inner_stride, block_size,   pack,         parse_dtype(dtype)};
}

SegmentMap map_of_layout(const py::object& layout, std::int32_t block_size, std::uint64_t base) {
  const auto number = [&](const char* name) { return layout.attr(name).cast<std::int64_t>(); };
  return SegmentMap{base + static_cast<std::uint64_t>(number("offset")),
                    number("block_stride"),
                    number("token_stride"),
                    number("head_stride"),
                    number("outer_stride"),
                    number("inner_stride"),
                    block_size,
                    static_cast<std::int32_t>(number("pack")),
                    parse_dtype(layout.attr("dtype").attr("code").cast<int>())};
}

std::pair<std::uint64_t, std::uint64_t> remap(const std::vector<Job>& jobs, std::uint64_t seed, int threads) {
  const py::gil_scoped_release release;
  std::vector<hetkv::remap::Job> views;
  views.reserve(jobs.size());
  for (const Job& job : jobs) views.push_back(job.view());
  const hetkv::remap::Result result = hetkv::remap::remap_cpu(views.data(), views.size(), seed, threads);
  return {result.checksum, result.saturated};
}

std::uint64_t checksum(const py::buffer& data, std::uint64_t offset, std::uint64_t seed) {
  require(offset % 8 == 0, "offset " + std::to_string(offset) + " is not a multiple of 8");
  const py::buffer_info info = data.request();
  require(info.ndim <= 1 && (info.size < 2 || info.strides[0] == info.itemsize), "the buffer must be contiguous");
  const auto bytes = static_cast<std::size_t>(info.size * info.itemsize);
  const py::gil_scoped_release release;
  return hetkv::remap::checksum_cpu(info.ptr, bytes, offset, seed);
}

py::buffer_info byte_buffer(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  require(info.ndim == 1 && info.itemsize == 1 && (info.size < 2 || info.strides[0] == 1),
          "the buffer must be contiguous bytes");
  return info;
}

void copy(const py::buffer& dst, const py::buffer& src, int threads) {
  const py::buffer_info to = byte_buffer(dst, true);
  const py::buffer_info from = byte_buffer(src, false);
  require(to.size == from.size, "copy from " + std::to_string(from.size) + " bytes to " + std::to_string(to.size));
  const py::gil_scoped_release release;
  hetkv::remap::copy_cpu(to.ptr, from.ptr, static_cast<std::size_t>(to.size), threads);
}

}  // namespace

void bind_remap(py::module_& m) {
  py::class_<SegmentMap>(m, "SegmentMap", "Where one segment's elements live: csrc/map.h. Strides are bytes.")
      .def(py::init(&make_map), py::kw_only(), py::arg("base"), py::arg("block_stride"), py::arg("token_stride"),
           py::arg("head_stride"), py::arg("outer_stride"), py::arg("inner_stride"), py::arg("block_size"),
           py::arg("pack"), py::arg("dtype"))
      .def_static("of", &map_of_layout, py::arg("layout"), py::arg("block_size"), py::arg("base"))
      .def_static(
          "canonical",
          [](std::uint64_t base, std::int64_t tokens, std::int32_t channels, int dtype) {
            return hetkv::canonical_map(base, tokens, channels, parse_dtype(dtype));
          },
          py::arg("base"), py::arg("tokens"), py::arg("channels"), py::arg("dtype"));
  py::class_<Side>(m, "RemapSide",
                   "One side of a job: a map, the block ids where it is paged (copied), where it starts, its scales.")
      .def(
          py::init([](const SegmentMap& map, const py::object& blocks, std::int64_t first_token,
                      std::int32_t first_head, const std::optional<SegmentMap>& scales,
                      std::int32_t channels_per_scale) {
            return Side{
                map, block_table(blocks), first_token, first_head, {scales.value_or(SegmentMap{}), channels_per_scale}};
          }),
          py::arg("map"), py::arg("blocks") = py::none(), py::arg("first_token") = 0, py::arg("first_head") = 0,
          py::arg("scales") = py::none(), py::arg("channels_per_scale") = 0);
  py::class_<Job>(m, "RemapJob", "tokens x heads x channels elements from one side to the other: csrc/remap/remap.h.")
      .def(py::init(&make_job), py::arg("src"), py::arg("dst"), py::kw_only(), py::arg("tokens"), py::arg("heads"),
           py::arg("channels"), py::arg("multipliers") = std::vector<float>(), py::arg("wire") = "",
           py::arg("wire_offset") = 0, py::arg("joint") = false, py::arg("wire_scale_offset") = 0,
           py::arg("largest") = 0.0f);
  m.def("remap", &remap, py::arg("jobs"), py::arg("seed") = 0, py::arg("threads") = 1,
        "Runs the jobs; returns (checksum of the wire sides, elements saturated). Releases the interpreter lock.");
  m.def("checksum", &checksum, py::arg("data"), py::arg("offset") = 0, py::arg("seed") = 0,
        "Payload checksum of a contiguous buffer whose first byte is byte `offset` of the payload.");
  m.def("copy", &copy, py::arg("dst"), py::arg("src"), py::arg("threads") = 1,
        "memcpy on the threads that remap uses: the yardstick of `hetkv bench remap`.");
  m.def("available_isas", &hetkv::remap::available_isas, "Instruction sets that remap can use here, narrowest first.");
  m.def(
      "select_isa",
      [](const std::string& name) {
        const hetkv::Status status = hetkv::remap::select_isa(name);
        require(status.ok(), status.detail);
      },
      py::arg("name"), "Makes remap use the named instruction set from now on.");
  m.def("isa", [] { return std::string(hetkv::remap::kernels().name); }, "The instruction set that remap uses.");
}
