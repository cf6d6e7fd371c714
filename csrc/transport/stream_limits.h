// Sizes that both directions of a stream share.
#pragma once

#include <cstddef>

#include "transport/seal.h"
#include "transport/stream_frame.h"
#include "wire/message.h"

namespace hetkv::transport {

constexpr std::size_t kMostAtOnce = std::size_t{4} << 20;  // of one stream, before others have their turn
constexpr std::size_t kMostMessage = wire::kMaxMessageBytes;
constexpr std::size_t kClearBytes = offsetof(FrameHeader, mac);  // of a header, ahead of its MAC or tag
constexpr std::size_t kAhead = 8 * 1024;  // read beyond what is under way: what is a payload there is copied once more
constexpr std::size_t kInputBytes = 256 * 1024;
constexpr std::size_t kWholeInput = kMostSealed + kClearBytes + sizeof(SealTag) + 2 * kAhead;  // of whole frames

}  // namespace hetkv::transport
