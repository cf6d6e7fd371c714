#include "engine/window_key.h"

#include <algorithm>
#include <cstring>
#include <random>

namespace hetkv::engine {
namespace {

constexpr char kMagic[8] = {'h', 'e', 't', 'k', 'v', 'w', 'i', 'n'};
constexpr std::uint32_t kVersion = 1;

struct KeyBytes {  // then the UCX key
  char magic[8];
  std::uint32_t version;
  std::uint32_t ucx_length;
  std::uint8_t process[16];
  char backend[16];  // zero-padded
  std::uint32_t device;
  std::uint32_t reserved;  // zero
  std::uint8_t handle[64];
  std::uint64_t offset;
  std::uint64_t length;
};
static_assert(sizeof(KeyBytes) == 136 && offsetof(KeyBytes, handle) == 56 && offsetof(KeyBytes, offset) == 120);

}  // namespace

const std::array<std::uint8_t, 16>& this_process() {
  static const auto number = [] {
    std::array<std::uint8_t, 16> out{};
    std::random_device source;
    for (auto& byte : out) byte = static_cast<std::uint8_t>(source());
    return out;
  }();
  return number;
}

bool is_device_key(const std::vector<std::uint8_t>& bytes) {
  return bytes.size() >= sizeof kMagic && std::memcmp(bytes.data(), kMagic, sizeof kMagic) == 0;
}

std::vector<std::uint8_t> encode_key(const DeviceWindowKey& key) {
  KeyBytes head{};
  std::memcpy(head.magic, kMagic, sizeof kMagic);
  head.version = kVersion;
  head.ucx_length = static_cast<std::uint32_t>(key.ucx.size());
  std::copy(key.process.begin(), key.process.end(), head.process);
  std::memcpy(head.backend, key.backend.data(), std::min(key.backend.size(), sizeof head.backend - 1));
  head.device = key.device;
  std::memcpy(head.handle, key.handle.bytes, sizeof head.handle);
  head.offset = key.handle.offset;
  head.length = key.handle.length;
  std::vector<std::uint8_t> out(sizeof head + key.ucx.size());
  std::memcpy(out.data(), &head, sizeof head);
  std::copy(key.ucx.begin(), key.ucx.end(), out.begin() + sizeof head);
  return out;
}

Status decode_key(const std::vector<std::uint8_t>& bytes, DeviceWindowKey* key) {
  const auto malformed = [](const char* what) {
    return Status::error(Code::kMalformed, std::string("the key of a window in device memory ") + what);
  };
  KeyBytes head;
  if (bytes.size() < sizeof head) return malformed("is cut short");
  std::memcpy(&head, bytes.data(), sizeof head);
  if (std::memcmp(head.magic, kMagic, sizeof kMagic) != 0) return malformed("has another magic");
  if (head.version != kVersion) {
    return Status::error(Code::kUnsupported, "the key of a window in device memory has version " +
                                                 std::to_string(head.version) + ", this side reads " +
                                                 std::to_string(kVersion));
  }
  if (head.ucx_length != bytes.size() - sizeof head) return malformed("has another length than it says");
  const char* const begin = head.backend;
  const char* const end = begin + sizeof head.backend;
  const bool filled = std::any_of(std::find(begin, end, '\0'), end, [](char c) { return c != '\0'; });
  if (head.reserved != 0 || *(end - 1) != 0 || filled) return malformed("has bytes that must be zero");
  std::copy(std::begin(head.process), std::end(head.process), key->process.begin());
  key->backend = head.backend;
  key->device = head.device;
  std::memcpy(key->handle.bytes, head.handle, sizeof head.handle);
  key->handle.offset = head.offset;
  key->handle.length = head.length;
  key->ucx.assign(bytes.begin() + sizeof head, bytes.end());
  return {};
}

}  // namespace hetkv::engine
