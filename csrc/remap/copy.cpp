#include "remap/copy.h"

#include <algorithm>
#include <cstring>

#include "remap/threads.h"

namespace hetkv::remap {
namespace {

struct Copy {
  char* dst;
  const char* src;
  std::size_t bytes;
  std::size_t parts;
};

}  // namespace

void copy_cpu(void* dst, const void* src, std::size_t bytes, int threads) noexcept {
  Copy copy{static_cast<char*>(dst), static_cast<const char*>(src), bytes,
            static_cast<std::size_t>(std::max(threads, 1))};
  const auto body = [](void* context, int part) noexcept {
    const Copy& c = *static_cast<const Copy*>(context);
    const std::size_t from = c.bytes / c.parts * static_cast<std::size_t>(part);
    const std::size_t to = static_cast<std::size_t>(part) + 1 == c.parts
                               ? c.bytes
                               : c.bytes / c.parts * (static_cast<std::size_t>(part) + 1);
    std::memcpy(c.dst + from, c.src + from, to - from);
  };
  parallel(static_cast<int>(copy.parts), body, &copy);
}

}  // namespace hetkv::remap
