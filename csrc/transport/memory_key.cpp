#include "transport/memory_key.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

namespace hetkv::transport {
namespace {

constexpr char kMagic[8] = {'h', 'e', 't', 'k', 'v', 'm', 'e', 'm'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kShared = 1;

struct KeyBytes {  // then the UCX key
  char magic[8];
  std::uint32_t version;
  std::uint32_t flags;
  std::uint32_t rma_length;
  std::uint32_t reserved;  // zero
};
static_assert(sizeof(KeyBytes) == 24 && offsetof(KeyBytes, flags) == 12 && offsetof(KeyBytes, rma_length) == 16);

}  // namespace

std::vector<std::uint8_t> encode(const MemoryKey& key) {
  KeyBytes head{};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  head.flags = key.shared ? kShared : 0;
  head.rma_length = static_cast<std::uint32_t>(key.rma.size());
  std::vector<std::uint8_t> out(sizeof head + key.rma.size());
  std::memcpy(out.data(), &head, sizeof head);
  std::copy(key.rma.begin(), key.rma.end(), out.begin() + sizeof head);
  return out;
}

Status decode(const std::vector<std::uint8_t>& bytes, MemoryKey* key) {
  const auto malformed = [](const char* what) {
    return Status::error(Code::kMalformed, std::string("the key of a window in host memory ") + what);
  };
  KeyBytes head;
  if (bytes.size() < sizeof head) return malformed("is cut short");
  std::memcpy(&head, bytes.data(), sizeof head);
  if (std::memcmp(head.magic, kMagic, sizeof kMagic) != 0) return malformed("has another magic");
  if (head.version != kVersion || (head.flags & ~kShared) != 0) {
    return Status::error(Code::kUnsupported, "the key of a window in host memory has version " +
                                                 std::to_string(head.version) + " and flags " +
                                                 std::to_string(head.flags) + ", which this side does not know");
  }
  if (head.rma_length != bytes.size() - sizeof head) return malformed("has another length than it says");
  if (head.reserved != 0) return malformed("has bytes that must be zero");
  key->shared = (head.flags & kShared) != 0;
  key->rma.assign(bytes.begin() + sizeof head, bytes.end());
  return {};
}

}  // namespace hetkv::transport
