// The path of layouts that turn the axes round: a tile goes into shared memory in the source's order and leaves it in
// the destination's, so that both sides see runs. It holds [token][channel] of the destination's dtype.
#pragma once

#include "backend/gpu/address.h"
#include "backend/gpu/convert8.h"

namespace hetkv::gpu {

struct Tile {
  std::uint32_t head;
  std::uint32_t channel;  // first
  std::int64_t token;     // first; below 0 where its first group begins before the job
};

HETKV_INLINE Tile tile_of(const Job& job, std::uint32_t chunk) {
  Tile tile;
  tile.channel = job.row_parts.split(chunk) << job.log_tile_channels;
  tile.head = job.heads.split(chunk);
  tile.token = static_cast<std::int64_t>(chunk) * (kTileElements >> job.log_tile_channels) - job.lead;
  return tile;
}

// Byte of an element in shared memory. Groups of 8 channels are shuffled by the token's group, so that lanes that read
// one channel of several groups of tokens meet different banks.
HETKV_INLINE std::uint32_t place(const Job& job, std::uint32_t token, std::uint32_t channel, std::uint32_t size) {
  const std::uint32_t groups = 1u << (job.log_tile_channels - 3);
  const std::uint32_t spread = job.log_lane_groups < 2 ? 1 : 0;
  const std::uint32_t group = (channel / kGroup) ^ ((token / kGroup << spread) & (groups - 1));
  return ((token * groups + group) * kGroup + channel % kGroup) * size;
}

// Item of the side whose channels lie together: 8 channels of one token.
struct ChannelRun {
  std::uint32_t token;
  std::uint32_t channel;
};

HETKV_INLINE ChannelRun channel_run(const Job& job, std::uint32_t item) {
  const std::uint32_t log_groups = job.log_tile_channels - 3u;
  return {item >> log_groups, (item & ((1u << log_groups) - 1)) * kGroup};
}

// Item of the side whose tokens lie together: 8 tokens of one channel. Neighbouring lanes take the groups of one
// channel that lie in a row, then the next channel.
struct TokenRun {
  std::uint32_t token;
  std::uint32_t channel;
};

HETKV_INLINE TokenRun token_run(const Job& job, std::uint32_t item) {
  const std::uint32_t low = item & ((1u << job.log_lane_groups) - 1);
  item >>= job.log_lane_groups;
  const std::uint32_t channel = item & ((1u << job.log_tile_channels) - 1);
  return {((item >> job.log_tile_channels << job.log_lane_groups) + low) * kGroup, channel};
}

template <int kWords>
HETKV_INLINE Vector<kWords>* shared_vector(std::uint8_t* shared, std::uint32_t at) {
  return reinterpret_cast<Vector<kWords>*>(shared + at);
}

// Which of the 8 tokens from `token` on belong to the job: [first, last).
struct Inside {
  std::uint32_t first;
  std::uint32_t last;
};

HETKV_INLINE Inside inside(const Job& job, std::int64_t token) {
  const std::int64_t left = static_cast<std::int64_t>(job.tokens) - token;
  return {token < 0 ? static_cast<std::uint32_t>(-token) : 0u, left < 0 ? 0u
                                                               : left > static_cast<std::int64_t>(kGroup)
                                                                   ? kGroup
                                                                   : static_cast<std::uint32_t>(left)};
}

// Address of 8 tokens of one channel; `token` may lie before the job's first, but in the same block.
HETKV_INLINE std::uint64_t token_run_address(const Side& side, std::uint32_t head, std::uint32_t channel,
                                             std::int64_t token) {
  std::uint32_t block = static_cast<std::uint32_t>(side.first_token + token);
  const std::uint32_t in_block = side.block_size.split(block);
  return head_channel(side, head, channel) +
         static_cast<std::uint64_t>(side.blocks[block] * side.block_stride + in_block * side.token_stride);
}

template <int kTo>
struct Turned {
  Vector<2 * kTo> codes{};
  std::uint32_t saturated = 0;
};

// 8 elements that convert8 leaves.
template <int kFrom, int kTo>
HETKV_CALL Turned<kTo> turn_slowly(DType from, DType to, Vector<2 * kFrom> codes, float multiplier) {
  Turned<kTo> turned;
  HETKV_UNROLL
  for (int i = 0; i < static_cast<int>(kGroup); ++i) {
    const std::uint64_t one = convert_one(from, to, element<kFrom>(codes, i), multiplier);
    add_element<kTo>(turned.codes, i, static_cast<std::uint32_t>(one));
    turned.saturated += static_cast<std::uint32_t>(one >> 32);
  }
  return turned;
}

// 8 elements of kFrom bytes as elements of kTo bytes.
template <int kFrom, int kTo, bool kConverts>
HETKV_INLINE Vector<2 * kTo> turn(const Job& job, const Vector<2 * kFrom>& codes, std::uint32_t head,
                                  Partial& partial) {
  if constexpr (!kConverts) {
    return codes;
  } else {
    const float multiplier = job.multipliers != nullptr ? job.multipliers[head] : 1.0f;
    Vector<2 * kTo> result;
    if (convert8<kFrom, kTo>(job.src.dtype, job.dst.dtype, codes, multiplier, &result)) return result;
    const Turned<kTo> turned = turn_slowly<kFrom, kTo>(job.src.dtype, job.dst.dtype, codes, multiplier);
    partial.saturated += turned.saturated;
    return turned.codes;
  }
}

// 8 tokens of one channel; zeros where they lie outside the job.
template <int kSize>
HETKV_INLINE Vector<2 * kSize> load_token_run(std::uint64_t src, Inside in) {
  if (in.first == 0 && in.last == kGroup) return load<2 * kSize>(src);
  Vector<2 * kSize> v{};
  HETKV_UNROLL
  for (std::uint32_t i = 0; i < kGroup; ++i) {
    if (i >= in.first && i < in.last) {
      add_element<kSize>(v, static_cast<int>(i), load_element(src + i * kSize, kSize));
    }
  }
  return v;
}

// First half: this thread's part of the source goes into shared memory.
template <int kFrom, int kTo, bool kConverts>
HETKV_INLINE void fill_tile(const Job& job, std::uint64_t seed, std::uint32_t chunk, std::uint32_t thread,
                            std::uint8_t* shared, Partial& partial) {
  constexpr std::uint32_t count = kTileElements / kGroup / kThreads;
  constexpr std::uint32_t batch = kConverts ? kConvertDepth : count;  // loads in flight
  const Tile tile = tile_of(job, chunk);
  const std::uint32_t row = kTo << job.log_tile_channels;
  HETKV_ROLLED
  for (std::uint32_t base = thread; base < thread + count * kThreads; base += batch * kThreads) {
    Vector<2 * kFrom> v[batch];
    if (!job.tokens_first) {
      HETKV_UNROLL
      for (std::uint32_t k = 0; k < batch; ++k) {
        const ChannelRun at = channel_run(job, base + k * kThreads);
        const std::int64_t token = tile.token + at.token;
        const std::uint32_t channel = tile.channel + at.channel;
        if (token < 0 || token >= job.tokens || channel >= job.channels.divisor) continue;
        v[k] = load<2 * kFrom>(head_channel(job.src, tile.head, channel) +
                               token_offset(job.src, static_cast<std::uint32_t>(token)));
      }
      HETKV_UNROLL
      for (std::uint32_t k = 0; k < batch; ++k) {
        const ChannelRun at = channel_run(job, base + k * kThreads);
        const std::int64_t token = tile.token + at.token;
        const std::uint32_t channel = tile.channel + at.channel;
        if (token < 0 || token >= job.tokens || channel >= job.channels.divisor) continue;
        *shared_vector<2 * kTo>(shared, place(job, at.token, at.channel, kTo)) =
            turn<kFrom, kTo, kConverts>(job, v[k], tile.head, partial);
        if (job.wire == WireSide::kSource) {
          partial.checksum +=
              sum(v[k], word_key(job, seed, tile.head, channel) + static_cast<std::uint64_t>(token) * job.token_key);
        }
      }
      continue;
    }
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < batch; ++k) {
      const TokenRun at = token_run(job, base + k * kThreads);
      const std::int64_t token = tile.token + at.token;
      const std::uint32_t channel = tile.channel + at.channel;
      const Inside in = inside(job, token);
      if (in.first >= in.last || channel >= job.channels.divisor) continue;
      v[k] = load_token_run<kFrom>(token_run_address(job.src, tile.head, channel, token), in);
    }
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < batch; ++k) {
      const TokenRun at = token_run(job, base + k * kThreads);
      const Inside in = inside(job, tile.token + at.token);
      if (in.first >= in.last || tile.channel + at.channel >= job.channels.divisor) continue;
      const Vector<2 * kTo> turned = turn<kFrom, kTo, kConverts>(job, v[k], tile.head, partial);
      const std::uint32_t first = place(job, at.token, at.channel, kTo);
      HETKV_UNROLL
      for (std::uint32_t i = 0; i < kGroup; ++i) {
        store_shared<kTo>(shared + first + i * row, element<kTo>(turned, static_cast<int>(i)));
      }
    }
  }
}

// Second half, once every thread has done the first: shared memory goes to this thread's part of the destination.
template <int kTo>
HETKV_INLINE void drain_tile(const Job& job, std::uint64_t seed, std::uint32_t chunk, std::uint32_t thread,
                             std::uint8_t* shared, Partial& partial) {
  constexpr std::uint32_t count = kTileElements / kGroup / kThreads;
  const Tile tile = tile_of(job, chunk);
  if (job.tokens_first) {
    HETKV_UNROLL
    for (std::uint32_t k = 0; k < count; ++k) {
      const ChannelRun at = channel_run(job, thread + k * kThreads);
      const std::int64_t token = tile.token + at.token;
      const std::uint32_t channel = tile.channel + at.channel;
      if (token < 0 || token >= job.tokens || channel >= job.channels.divisor) continue;
      const Vector<2 * kTo> v = *shared_vector<2 * kTo>(shared, place(job, at.token, at.channel, kTo));
      store<2 * kTo>(
          head_channel(job.dst, tile.head, channel) + token_offset(job.dst, static_cast<std::uint32_t>(token)), v);
      if (job.wire == WireSide::kDestination) {
        partial.checksum +=
            sum(v, word_key(job, seed, tile.head, channel) + static_cast<std::uint64_t>(token) * job.token_key);
      }
    }
    return;
  }
  HETKV_UNROLL
  for (std::uint32_t k = 0; k < count; ++k) {
    const TokenRun at = token_run(job, thread + k * kThreads);
    const std::int64_t token = tile.token + at.token;
    const std::uint32_t channel = tile.channel + at.channel;
    const Inside in = inside(job, token);
    if (in.first >= in.last || channel >= job.channels.divisor) continue;
    const std::uint32_t first = place(job, at.token, at.channel, kTo);
    const std::uint32_t row = kTo << job.log_tile_channels;
    Vector<2 * kTo> v{};
    HETKV_UNROLL
    for (std::uint32_t i = 0; i < kGroup; ++i) {
      add_element<kTo>(v, static_cast<int>(i), load_shared<kTo>(shared + first + i * row));
    }
    const std::uint64_t dst = token_run_address(job.dst, tile.head, channel, token);
    if (in.first == 0 && in.last == kGroup) {
      store<2 * kTo>(dst, v);
      continue;
    }
    HETKV_UNROLL
    for (std::uint32_t i = 0; i < kGroup; ++i) {
      if (i >= in.first && i < in.last) {
        store_element(dst + i * kTo, kTo, element<kTo>(v, static_cast<int>(i)));
      }
    }
  }
}

}  // namespace hetkv::gpu
