// One frame of a plan packed or unpacked where it stands, for those who keep frames instead of sending them.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "clock.h"
#include "engine/config.h"
#include "engine/mover.h"
#include "job.h"
#include "wire/layout.h"
#include "wire/message.h"

namespace hetkv {
namespace {

using engine::LayerPlan;
using engine::RemapTask;

template <std::size_t N>
std::array<std::uint8_t, N> exactly(const py::bytes& bytes, const char* what) {
  const std::string_view view = bytes;
  require(view.size() == N,
          std::string(what) + " has " + std::to_string(view.size()) + " bytes, not " + std::to_string(N));
  std::array<std::uint8_t, N> out{};
  std::copy(view.begin(), view.end(), out.begin());
  return out;
}

wire::Record record_of(const LayerPlan& plan, std::uint64_t start, std::uint64_t stop, const py::buffer_info& payload) {
  require(start < stop, "tokens [" + std::to_string(start) + ", " + std::to_string(stop) + ") are none");
  wire::Record record;
  record.frame = engine::frame_of(plan, {start, stop});
  require(payload.ndim == 1 && payload.itemsize == 1 && (payload.size < 2 || payload.strides[0] == 1) &&
              static_cast<std::uint64_t>(payload.size) == record.frame.payload_length,
          "the payload is " + std::to_string(record.frame.payload_length) + " contiguous bytes");
  require(reinterpret_cast<std::uintptr_t>(payload.ptr) % 8 == 0, "the payload begins at a multiple of 8");
  return record;
}

// Every token of the frame must be in a block of each of the pool's maps; block ids are the caller's.
void check_blocks(const LayerPlan& plan, const std::vector<std::int32_t>& blocks, std::uint64_t pool_token,
                  std::uint64_t tokens) {
  for (const engine::SegmentPlan& segment : plan.segments) {
    if (segment.carried) continue;
    const auto size = static_cast<std::uint64_t>(segment.pool.block_size);
    require(size > 0 && (pool_token + tokens + size - 1) / size <= blocks.size(),
            std::to_string(pool_token + tokens) + " tokens do not fit " + std::to_string(blocks.size()) +
                " blocks of " + std::to_string(size));
  }
  require(std::all_of(blocks.begin(), blocks.end(), [](std::int32_t id) { return id >= 0; }), "a block id is negative");
}

remap::Result move(const LayerPlan& plan, const std::vector<std::int32_t>& blocks, const wire::Record& record,
                   void* payload, std::uint64_t pool_token, bool pack, int threads) {
  const py::gil_scoped_release release;
  RemapTask task;
  engine::add_frame(plan, std::make_shared<const std::vector<std::int32_t>>(blocks), record,
                    reinterpret_cast<std::uintptr_t>(payload), pack, &task);
  for (remap::Job& job : task.jobs) {
    (pack ? job.src : job.dst).first_token = static_cast<std::int64_t>(pool_token);
  }
  engine::CpuMover(threads, system_clock()).submit(&task);
  return task.frames.front().result;
}

py::bytes pack_frame(const LayerPlan& plan, const std::vector<std::int32_t>& blocks, const py::bytes& request_id,
                     std::uint64_t sequence, const py::bytes& key, std::uint64_t token_start, std::uint64_t token_stop,
                     std::uint64_t pool_token, const py::buffer& payload, int threads) {
  const py::buffer_info info = payload.request(true);
  wire::Record record = record_of(plan, token_start, token_stop, info);
  record.request = exactly<16>(request_id, "request_id");
  check_blocks(plan, blocks, pool_token, token_stop - token_start);
  const remap::Result result = move(plan, blocks, record, info.ptr, pool_token, true, threads);
  record.frame.checksum = result.checksum;
  record.frame.saturated = result.saturated;
  wire::Prelude prelude;
  prelude.type = wire::Type::kFrame;
  prelude.sequence = sequence;
  prelude.request = record.request;
  std::vector<std::uint8_t> out;
  wire::encode(prelude, record.frame, exactly<16>(key, "key"), out);
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

std::uint64_t unpack_frame(const LayerPlan& plan, const std::vector<std::int32_t>& blocks, std::uint64_t tokens,
                           std::uint64_t pool_token, const py::buffer& payload, int threads) {
  const py::buffer_info info = payload.request();
  const wire::Record record = record_of(plan, 0, tokens, info);
  check_blocks(plan, blocks, pool_token, tokens);
  return move(plan, blocks, record, info.ptr, pool_token, false, threads).saturated;
}

}  // namespace

void bind_frame(py::module_& m) {
  using namespace py::literals;
  m.attr("FRAME_BYTES") = wire::kMinMessageBytes + sizeof(wire::FrameBytes);
  m.def("pack_frame", &pack_frame, "plan"_a, "blocks"_a, py::kw_only(), "request_id"_a, "sequence"_a, "key"_a,
        "token_start"_a, "token_stop"_a, "pool_token"_a, "payload"_a, "threads"_a = 1,
        "Packs tokens of a layer, the pool's from `pool_token` on, into `payload`; returns the frame's message.");
  m.def("unpack_frame", &unpack_frame, "plan"_a, "blocks"_a, py::kw_only(), "tokens"_a, "pool_token"_a, "payload"_a,
        "threads"_a = 1, "Unpacks a payload of `tokens` tokens; returns how many elements saturated.");
}

}  // namespace hetkv
