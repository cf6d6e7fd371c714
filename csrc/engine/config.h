// What Python decides and C++ carries out: settings of an engine, the plan of a link.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "map.h"
#include "remap/remap.h"
#include "transport/transport.h"
#include "wire/siphash.h"

namespace hetkv::engine {

struct EngineConfig {
  std::size_t slot_bytes = 1 << 20;     // of one window slot, and of one staging buffer
  std::size_t window_bytes = 32 << 20;  // receiver: budget of all its slots together
  int staging_slots = 4;                // sender: staging buffers, used where the window cannot be stored into
  int max_slots_per_link = 8;           // receiver: most slots that one sender may hold
  int threads = 1;                      // per remap on the CPU
  int max_blocks = 0;                   // thread blocks of a remap on a device; 0: as many as fit
  std::uint32_t spin_us = 1000;         // how long the progress thread, and who waits for it, spins before it sleeps
  std::uint32_t heartbeat_ms = 500;
  std::uint32_t peer_timeout_ms = 3000;  // silence after which a peer is lost
  bool copy_engine = true;       // into a window on another device: pack next to the pool, then copy, so that few
                                 // multiprocessors are taken; otherwise the pack stores over the link itself
  bool high_priority = true;     // of remaps on a device, over other work of the process
  bool direct = true;            // store into the peer's window where it can be mapped (reach `shared`, `peer`)
  std::size_t verify_bytes = 0;  // receiver: scratch memory in which what was unpacked is read again from the pool, and
                                 // compared (engine/reread.h); 0: it is not
  bool isolate_peers = false;    // receiver: a slot that goes to another link gets new memory; windows in host memory
  int bundle_frames = 64;        // sender: most frames of a bundle
  std::vector<std::int32_t> layer_groups;  // of each global layer: its cache group; -1: it is not in the pool
  bool device_scales = false;  // links on which a device applies or copies scales that a codec sends are not rejected
  bool trace = false;
  std::string rma;  // transports of UCX on which payloads are put; empty: none
};

// One segment of one layer on this side, for the heads of one route.
struct SegmentPlan {
  SegmentMap pool;
  std::int32_t first_head = 0;  // local
  std::int32_t channels = 0;
  DType wire_dtype = DType::kUInt8;
  std::vector<float> multipliers;  // per head of the route, pool -> wire for a sender, wire -> pool for a receiver
  // Scales that are applied or found while this segment is converted (remap::Job). Scales that move as they are, bit
  // for bit or times a constant, are a segment of their own instead.
  remap::Scales pool_scales;
  std::int32_t wire_scales = -1;  // index of the segment that is this one's scales on the wire; -1: none
  bool joint = false;
  float largest = 0;     // sender: what the largest code of a group is where its scale is found; 0: the dtype's
  bool carried = false;  // is the scales of another segment, whose job reads or writes this part of the payload too
};

// Scales of a receiver's pool that are the same for all tokens, and so are not on the wire.
struct ScaleFill {
  SegmentMap pool;
  std::int32_t first_head = 0;  // local
  std::int32_t groups = 0;
  std::vector<float> values;  // per head of the route
};

// One layer of one route: what a frame of it holds, and where that is in this side's pool.
struct LayerPlan {
  std::uint32_t layer = 0;  // global
  std::uint16_t group = 0;  // cache group
  std::uint32_t head_start = 0;
  std::uint32_t head_stop = 0;
  std::vector<SegmentPlan> segments;
  std::vector<ScaleFill> fills;
  std::uint8_t scale_encoding = 0;  // of its frames

  std::int32_t heads() const { return static_cast<std::int32_t>(head_stop - head_start); }
  // Bytes of a payload of `tokens` tokens; every segment's part starts at a multiple of 8.
  std::uint64_t payload_bytes(std::uint64_t tokens) const {
    std::uint64_t bytes = 0;
    for (const auto& segment : segments) bytes = part_end(bytes, segment, tokens);
    return bytes;
  }
  // Most tokens whose payload is sure to fit into `room` bytes.
  std::uint64_t tokens_in(std::uint64_t room) const {
    const std::uint64_t padding = 8 * segments.size();
    std::uint64_t bytes = 0;  // of one token, without padding
    for (const auto& segment : segments) {
      bytes += static_cast<std::uint64_t>(heads()) * static_cast<std::uint64_t>(segment.channels) *
               static_cast<std::uint64_t>(item_size(segment.wire_dtype));
    }
    return std::max(room / payload_bytes(1), room > padding ? (room - padding) / bytes : 0);
  }
  std::uint64_t part_end(std::uint64_t start, const SegmentPlan& segment, std::uint64_t tokens) const {
    const auto size =
        static_cast<std::uint64_t>(segment.channels) * static_cast<std::uint64_t>(item_size(segment.wire_dtype));
    return (start + static_cast<std::uint64_t>(heads()) * tokens * size + 7) / 8 * 8;
  }
};

struct LinkConfig {
  std::vector<std::uint8_t> address;  // of the peer's transport; empty: no RDMA
  std::uint64_t number = 0;           // of the link, equal on both sides; travels in the header of each message
  std::uint8_t minor = 0;             // version of the link: the lower one of the two sides
  wire::SipKey send_key{};
  wire::SipKey receive_key{};
  std::string name;                  // of the peer, `instance/rank`
  std::string instance;              // of the peer
  std::uint32_t instance_links = 1;  // links to that instance that have plans
  bool device_windows = false;       // receiver: grant this peer slots in the pool's device's memory,
  bool rdma_windows = false;         // of which another host puts into
  std::vector<LayerPlan> plans;
  std::vector<transport::StreamConfig> streams;  // sockets to the peer
  transport::Coding coding;                      // of their payloads
  int threads = 0;                               // of a pack or unpack of its payloads on CPUs; 0: the engine's
  std::uint32_t frame_ms = 0;  // what moving a frame of the largest slot may take, in which no heartbeat is sent
};

}  // namespace hetkv::engine
