#include <algorithm>

#include "map.h"
#include "wire/body.h"
#include "wire/layout.h"
#include "wire/message.h"

namespace hetkv::wire {
namespace {

using std::to_string;

constexpr std::uint64_t kTooMany = kMaxPayloadBytes + 1;

// a * b, or kTooMany where that is above kMaxPayloadBytes.
constexpr std::uint64_t bounded_product(std::uint64_t a, std::uint64_t b) {
  if (a == 0 || b == 0) return 0;
  return a > kMaxPayloadBytes / b ? kTooMany : a * b;
}

std::string at(const char* field, std::size_t i) {
  return std::string("frame: ") + field + "[" + to_string(i) + "]";
}

template <class T>
Status check_interval(const char* what, T start, T stop) {
  if (start < stop) return {};
  return malformed(std::string("frame: ") + what + " interval [" + to_string(start) + ", " + to_string(stop) +
                   ") is empty or reversed");
}

Status check_segment(const FrameIdentityBytes& raw, std::size_t i, std::uint8_t minor) {
  const bool present = (raw.segments >> i & 1) != 0;
  if (!present) {
    if (raw.dtypes[i] != 0)
      return malformed(at("dtypes", i) + " is " + to_string(raw.dtypes[i]) + ", but the segment is absent");
    if (raw.channels[i] != 0) {
      return malformed(at("channels", i) + " is " + to_string(raw.channels[i]) + ", but the segment is absent");
    }
    return {};
  }
  if (raw.dtypes[i] == 0) return malformed(at("dtypes", i) + " is 0, but the segment is present");
  if (raw.dtypes[i] > static_cast<std::uint8_t>(DType::kUInt8))
    return unknown_code(at("dtypes", i), raw.dtypes[i], minor);
  if (raw.channels[i] == 0) return malformed(at("channels", i) + " is 0, but the segment is present");
  return {};
}

Status check_scales(const FrameIdentityBytes& raw) {
  const std::string encoding = "frame: scale_encoding is " + to_string(raw.scale_encoding);
  if ((raw.scale_encoding & ~raw.segments) != 0) return malformed(encoding + ", which names an absent segment");
  const std::array<int, kMaxSegments> scales = scales_of(raw.segments, raw.scale_encoding);
  for (const int scale : scales) {
    if (scale >= 0 && (raw.scale_encoding >> scale & 1) != 0) {
      return malformed(encoding + ", but segments is " + to_string(raw.segments) + ": too few for the scales");
    }
  }
  for (std::size_t i = 0; i < kMaxSegments; ++i) {
    if (scales[i] < 0) continue;
    const auto at_scale = static_cast<std::size_t>(scales[i]);
    if (raw.dtypes[i] < static_cast<std::uint8_t>(DType::kFloat8E4M3FN) ||
        raw.dtypes[i] > static_cast<std::uint8_t>(DType::kInt8)) {
      return malformed(at("dtypes", i) + " is " + to_string(raw.dtypes[i]) + ", which takes no scales");
    }
    if (raw.dtypes[at_scale] != static_cast<std::uint8_t>(DType::kFloat32)) {
      return malformed(at("dtypes", at_scale) + " is " + to_string(raw.dtypes[at_scale]) +
                       ", but scales are float32 (1)");
    }
    if (raw.channels[i] % raw.channels[at_scale] != 0) {
      return malformed(at("channels", i) + " is " + to_string(raw.channels[i]) + ", which " +
                       to_string(raw.channels[at_scale]) + " scales do not divide");
    }
  }
  return {};
}

Status check_payload(const Frame& frame) {
  const PayloadLayout layout = payload_layout(frame);
  if (layout.total > kMaxPayloadBytes) {
    return malformed("frame: heads, tokens, channels and dtypes ask for a payload over the limit of " +
                     to_string(kMaxPayloadBytes) + " bytes");
  }
  if (frame.payload_length != layout.total) {
    return malformed("frame: payload_length is " + to_string(frame.payload_length) +
                     ", but heads, tokens, channels and dtypes make " + to_string(layout.total));
  }
  std::uint64_t elements = 0;
  for (std::size_t i = 0; i < kMaxSegments; ++i) {
    if (layout.bytes[i] > 0) elements += layout.bytes[i] / item_size(static_cast<DType>(frame.dtypes[i]));
  }
  if (frame.saturated > elements) {
    return malformed("frame: saturated is " + to_string(frame.saturated) + ", but there are " + to_string(elements) +
                     " elements");
  }
  return {};
}

// All that a frame says of itself; the caller checks its payload.
Status read_identity(const FrameIdentityBytes& raw, std::uint8_t minor, Frame* frame) {
  if (raw.segments == 0) return malformed("frame: segments is 0, which names no segment");
  if (raw.segments >> kMaxSegments != 0) {
    return malformed("frame: segments is " + to_string(raw.segments) + ", which names a segment above 3");
  }
  if (Status status = check_interval("head", raw.head_start, raw.head_stop); !status.ok()) return status;
  if (Status status = check_interval("token", raw.token_start, raw.token_stop); !status.ok()) return status;
  if (raw.reserved != 0) return malformed("frame: reserved is " + to_string(raw.reserved) + ", not 0");
  if (raw.scale_encoding >> kMaxSegments != 0) return unknown_code("frame: scale_encoding", raw.scale_encoding, minor);
  if (raw.codec != 0) return unknown_code("frame: codec", raw.codec, minor);
  for (std::size_t i = 0; i < kMaxSegments; ++i) {
    if (Status status = check_segment(raw, i, minor); !status.ok()) return status;
  }
  if (Status status = check_scales(raw); !status.ok()) return status;
  frame->group = raw.group;
  frame->segments = raw.segments;
  frame->layer = raw.layer;
  frame->head_start = raw.head_start;
  frame->head_stop = raw.head_stop;
  frame->token_start = raw.token_start;
  frame->token_stop = raw.token_stop;
  std::copy(std::begin(raw.dtypes), std::end(raw.dtypes), frame->dtypes.begin());
  frame->scale_encoding = raw.scale_encoding;
  frame->codec = raw.codec;
  std::copy(std::begin(raw.channels), std::end(raw.channels), frame->channels.begin());
  return {};
}

Status read_record(const RecordBytes& raw, std::uint8_t minor, Record* record) {
  const std::uint8_t* id = raw.identity.request;
  if (std::all_of(id, id + sizeof(raw.identity.request), [](std::uint8_t b) { return b == 0; })) {
    return malformed("request_id is all zeros");
  }
  std::copy(id, id + sizeof(raw.identity.request), record->request.begin());
  record->epoch = raw.identity.epoch;
  Frame& frame = record->frame;
  if (Status status = read_identity(raw.identity.frame, minor, &frame); !status.ok()) return status;
  frame.payload_length = raw.payload_length;
  frame.checksum = raw.checksum;
  frame.saturated = raw.saturated;
  record->payload_offset = raw.payload_offset;
  return check_payload(frame);
}

}  // namespace

std::array<int, kMaxSegments> scales_of(std::uint16_t segments, std::uint8_t scale_encoding) {
  std::array<int, kMaxSegments> scales;
  scales.fill(-1);
  int scale = static_cast<int>(kMaxSegments);
  for (int i = static_cast<int>(kMaxSegments) - 1; i >= 0; --i) {  // the last of both, then the one before
    if ((scale_encoding >> i & 1) == 0) continue;
    do {
      --scale;
    } while (scale >= 0 && (segments >> scale & 1) == 0);
    if (scale < 0) break;
    scales[static_cast<std::size_t>(i)] = scale;
  }
  return scales;
}

PayloadLayout payload_layout(const Frame& frame) {
  PayloadLayout layout;
  const std::uint64_t heads = frame.head_stop - frame.head_start;
  const std::uint64_t rows = bounded_product(heads, frame.token_stop - frame.token_start);
  for (std::size_t i = 0; i < kMaxSegments; ++i) {
    if ((frame.segments >> i & 1) == 0) continue;
    const std::uint64_t row = std::uint64_t{frame.channels[i]} * item_size(static_cast<DType>(frame.dtypes[i]));
    layout.offsets[i] = layout.total;
    layout.bytes[i] = bounded_product(rows, row);
    layout.total = std::min(layout.total + (layout.bytes[i] + 7) / 8 * 8, kTooMany);
  }
  return layout;
}

Status decode(const std::uint8_t* data, std::size_t size, Frame* body) {
  Type type = Type::kFrame;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  FrameBytes raw{};
  if (!found.reader.take(&raw)) return malformed("frame: body is too short");
  Frame frame;
  if (Status status = read_identity(raw.identity, found.minor, &frame); !status.ok()) return status;
  frame.slot = raw.slot;
  frame.generation = raw.generation;
  frame.payload_length = raw.payload_length;
  frame.checksum = raw.checksum;
  frame.saturated = raw.saturated;
  if (Status status = check_payload(frame); !status.ok()) return status;
  *body = frame;
  return {};
}

Status decode(const std::uint8_t* data, std::size_t size, Bundle* body) {
  Type type = Type::kBundle;
  Body found = find_body(data, size, &type);
  if (!found.status.ok()) return found.status;
  BundleBytes raw{};
  if (!found.reader.take(&raw)) return malformed("bundle: body is too short");
  if (raw.reserved != 0) return malformed("bundle: reserved is " + to_string(raw.reserved) + ", not 0");
  if (raw.num_frames == 0) return malformed("bundle: num_frames is 0");
  if (found.reader.left() != std::uint64_t{raw.num_frames} * sizeof(RecordBytes)) {
    return malformed("bundle: num_frames is " + to_string(raw.num_frames) + ", but " + to_string(found.reader.left()) +
                     " bytes of frames follow");
  }
  Bundle bundle{raw.slot, raw.generation, std::vector<Record>(raw.num_frames)};
  std::uint64_t end = 0;  // of the payload before
  for (std::size_t i = 0; i < bundle.records.size(); ++i) {
    Record& record = bundle.records[i];
    RecordBytes bytes{};
    Status status = found.reader.take(&bytes) ? read_record(bytes, found.minor, &record) : malformed("is cut short");
    if (status.ok() && record.payload_offset % kPayloadAlignment != 0) {
      status = malformed("payload_offset is " + to_string(record.payload_offset) + ", not a multiple of " +
                         to_string(kPayloadAlignment));
    }
    if (status.ok() && (record.payload_offset < end || record.payload_offset > kMaxPayloadBytes)) {
      status = malformed("payload_offset is " + to_string(record.payload_offset) + ", not from " + to_string(end) +
                         " to " + to_string(kMaxPayloadBytes));
    }
    if (!status.ok()) {
      status.detail = "bundle: frames[" + to_string(i) + "]: " + status.detail;
      return status;
    }
    end = record.payload_offset + record.frame.payload_length;
  }
  *body = std::move(bundle);
  return {};
}

}  // namespace hetkv::wire
