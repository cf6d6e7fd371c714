// What a caller says of a node (node.h), checked and with the defaults.
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>

#include "capi/node.h"

namespace hetkv::capi {
namespace {

constexpr std::size_t kLeastSecret = 16, kMiB = 1 << 20;

Result invalid(std::string text) {
  return failure(HETKV_INPUT, std::move(text));
}

Result read_secret(std::vector<std::uint8_t>* out) {
  const char* named = std::getenv("HETKV_SECRET_FILE");
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  std::string path = named != nullptr && *named != '\0' ? named : "";
  if (path.empty()) {
    path = (cache != nullptr && *cache != '\0' ? std::string(cache)
                                               : std::string(home == nullptr ? "" : home) + "/.cache") +
           "/hetkv/secret";
  }
  struct stat found{};
  if (stat(path.c_str(), &found) != 0) {
    return invalid("no secret was given, and there is no file " + path +
                   ": give one, or name its file in HETKV_SECRET_FILE");
  }
  if ((found.st_mode & (S_IRWXG | S_IRWXO)) != 0)
    return invalid("secret file " + path + " can be used by others: chmod 600 it");
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  while (!text.empty() && space(text.back())) text.pop_back();
  text.erase(text.begin(), std::find_if_not(text.begin(), text.end(), space));
  out->assign(text.begin(), text.end());
  return {};
}

// 32 MiB, or half of the last-level cache where that is smaller.
std::size_t default_window() {
  std::size_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
    std::size_t kib = 0;
    if (file >> kib) largest = std::max(largest, kib * 1024);
  }
  return largest == 0 ? 32 * kMiB : std::clamp(largest / 2, 4 * kMiB, 32 * kMiB);
}

// Most bytes that a byte of a payload becomes in the pool, as values of one byte may travel.
std::size_t most_growth(const Pool& pool) {
  std::size_t growth = 1;
  for (const control::LayerGroup& group : pool.layers) {
    for (const auto& [name, segment] : group.layout.segments) {
      growth = std::max(growth, static_cast<std::size_t>(item_size(segment.dtype)));
    }
  }
  return growth;
}

}  // namespace

Result read_settings(const hetkv_node_config& config, const Pool& pool, NodeSettings* out) {
  if (config.struct_bytes != sizeof(hetkv_node_config)) return invalid("struct_bytes: use HETKV_INIT");
  if (config.instance == nullptr || *config.instance == '\0') return invalid("instance is a name");
  out->instance = config.instance;
  if (config.secret != nullptr) {
    const auto* first = static_cast<const std::uint8_t*>(config.secret);
    out->secret.assign(first, first + config.secret_bytes);
  } else {
    Result result = read_secret(&out->secret);
    if (!result.ok()) return result;
  }
  if (out->secret.size() < kLeastSecret) return invalid("the shared secret must have 16 bytes or more");
  for (std::uint32_t at = 0; at < config.num_fingerprint; ++at) {
    const char *name = config.fingerprint[2 * at], *value = config.fingerprint[2 * at + 1];
    if (name == nullptr || value == nullptr) return invalid("fingerprint: names and values in turn");
    out->fingerprint[name] = value;
  }
  out->backends = config.backends == nullptr ? "" : config.backends;
  const bool on_device = pool.device != "cpu";
  engine::EngineConfig& engine = out->engine;
  engine.slot_bytes = config.slot_bytes > 0 ? config.slot_bytes : (on_device ? 16 * kMiB : kMiB);
  engine.window_bytes = config.window_bytes > 0 ? config.window_bytes
                        : on_device             ? 16 * engine.slot_bytes
                                                : std::max(engine.slot_bytes, default_window());
  if (engine.window_bytes < engine.slot_bytes) return invalid("window_bytes holds no slot of slot_bytes");
  engine.staging_slots = on_device ? 6 : 4;
  if (config.verify_pool > 1) return invalid("verify_pool is 0 or 1");
  if (config.verify_pool == 1) engine.verify_bytes = engine.slot_bytes * most_growth(pool);
  if (config.isolate_peers > 1) return invalid("isolate_peers is 0 or 1");
  engine.isolate_peers = config.isolate_peers == 1;
  if (config.threads > 0) engine.threads = static_cast<int>(config.threads);
  if (config.heartbeat_ms > 0) engine.heartbeat_ms = config.heartbeat_ms;
  if (config.peer_timeout_ms > 0) engine.peer_timeout_ms = config.peer_timeout_ms;
  if (config.lease_ms > 0) out->lease_ms = config.lease_ms;
  if (config.hold_ms > 0) out->hold_ms = config.hold_ms;
  if (config.handshake_timeout_ms > 0) out->handshake_timeout_ms = config.handshake_timeout_ms;
  return {};
}

}  // namespace hetkv::capi
