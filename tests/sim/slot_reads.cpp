// A peer that writes to its slot while a CPU unpacks it: `hetkv_slot_reads ROUNDS`. A thread flips one word of the
// payload between two values; whichever of them the checksum certifies must be the one in the pool. Exit status 1: it
// was not. One kind for each way in which a payload is read.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "clock.h"
#include "engine/mover.h"

namespace hetkv::sim {
namespace {

struct Kind {
  const char* name;
  DType from, to;
  std::int32_t channels;
  std::int64_t tokens;
  bool by_token;  // the pool is [token][channel], otherwise [channel][token]
  std::int32_t scales = 0;
};

constexpr Kind kKinds[] = {
    {"plain rows", DType::kBFloat16, DType::kBFloat16, 64, 1024, true},
    {"transposed", DType::kBFloat16, DType::kBFloat16, 64, 1024, false},
    {"converted", DType::kBFloat16, DType::kFloat32, 64, 1024, true},
    {"odd rows", DType::kUInt8, DType::kUInt8, 5, 16384, true},
    {"odd rows, converted", DType::kBFloat16, DType::kFloat32, 3, 16384, true},
    {"rows of 16 KiB", DType::kFloat32, DType::kBFloat16, 4096, 64, true},
    {"rows of 256 KiB", DType::kFloat32, DType::kBFloat16, 65536, 4, true},
    {"scales", DType::kInt8, DType::kBFloat16, 64, 4096, true, 1},
};

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + 7) / 8 * 8;
}

// One frame of one head, and the pool it goes to.
struct Transfer {
  explicit Transfer(const Kind& its_kind) : kind(its_kind) {
    const auto values = static_cast<std::size_t>(kind.tokens * kind.channels);
    const std::size_t codes = aligned(values * static_cast<std::size_t>(item_size(kind.from)));
    payload.resize((codes + aligned(static_cast<std::size_t>(kind.tokens * kind.scales) * sizeof(float))) / 8);
    pool.resize(aligned(values * static_cast<std::size_t>(item_size(kind.to))) / 8);
    std::uint64_t state = 1;
    for (auto& word : payload) {
      word =
          (state = state * 6364136223846793005u + 1442695040888963407u) & 0x3f3f3f3f3f3f3f3f;  // no NaN in any format
    }
    const std::int64_t size = item_size(kind.to);
    job.src.map = canonical_map(reinterpret_cast<std::uint64_t>(payload.data()), kind.tokens, kind.channels, kind.from);
    job.dst.map = canonical_map(reinterpret_cast<std::uint64_t>(pool.data()), kind.tokens, kind.channels, kind.to);
    if (!kind.by_token) {
      job.dst.map.token_stride = size;
      job.dst.map.inner_stride = kind.tokens * size;
    }
    job.tokens = kind.tokens;
    job.heads = 1;
    job.channels = kind.channels;
    job.wire = remap::WireSide::kSource;
    if (kind.scales > 0) {
      auto* at = reinterpret_cast<float*>(reinterpret_cast<char*>(payload.data()) + codes);
      for (std::int64_t i = 0; i < kind.tokens * kind.scales; ++i) at[i] = 0.5f;
      job.src_scales.map =
          canonical_map(reinterpret_cast<std::uint64_t>(at), kind.tokens, kind.scales, DType::kFloat32);
      job.src_scales.channels_per_scale = kind.channels / kind.scales;
      job.wire_scale_offset = codes;
    }
  }

  std::uint64_t unpack(engine::CpuMover& mover) {
    engine::RemapTask task;
    task.jobs.push_back(job);
    task.frames.push_back({1, 7, {}});
    task.tables.push_back(nullptr);
    mover.submit(&task);
    return task.frames[0].result.checksum;
  }

  const Kind& kind;
  std::vector<std::uint64_t> payload, pool;
  remap::Job job;
};

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  int wrong = 0;
  std::printf("{\"rounds\": %d, \"wrong\": {", rounds);
  for (const Kind& kind : kKinds) {
    Transfer transfer(kind);
    engine::CpuMover mover(1, system_clock());
    const std::size_t codes = static_cast<std::size_t>(kind.tokens * kind.channels * item_size(kind.from));
    std::uint64_t* word = &transfer.payload[codes / 8 / 2];
    const std::uint64_t values[2] = {*word, *word ^ 0x0101010101010101u};
    std::uint64_t sums[2];
    std::vector<std::uint64_t> pools[2];
    for (int i = 0; i < 2; ++i) {
      *word = values[i];
      sums[i] = transfer.unpack(mover);
      pools[i] = transfer.pool;
    }
    std::atomic<bool> over{false};
    std::thread peer([&] {
      for (std::uint64_t i = 0; !over.load(std::memory_order_relaxed); ++i) {
        __atomic_store_n(word, values[i / 64 % 2], __ATOMIC_RELAXED);
      }
    });
    int mine = 0, seen[2] = {0, 0};
    for (int round = 0; round < rounds; ++round) {
      const std::uint64_t sum = transfer.unpack(mover);
      for (int i = 0; i < 2; ++i) {
        if (sum != sums[i]) continue;
        ++seen[i];
        mine += transfer.pool != pools[i] ? 1 : 0;
      }
    }
    over = true;
    peer.join();
    std::printf("%s\"%s\": [%d, %d, %d]", &kind == kKinds ? "" : ", ", kind.name, mine, seen[0], seen[1]);
    wrong += mine;
  }
  std::printf("}}\n");
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace hetkv::sim

int main(int argc, char** argv) {
  return hetkv::sim::main(argc, argv);
}
