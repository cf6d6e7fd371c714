// The functions of include/hetkv.h. No exception passes them.
#include "hetkv.h"

#include <dlfcn.h>

#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>

#include "capi/node.h"

struct hetkv_pool {
  std::shared_ptr<const hetkv::capi::Pool> pool;
};

struct hetkv_node {
  std::shared_ptr<hetkv::capi::Node> node;
};

namespace {

using hetkv::failure;
using hetkv::Result;
using hetkv::capi::Node;
using hetkv::control::Role;

constexpr std::size_t kAddressBytes = 64;  // the least room for an address
// What is added to a structure goes where its padding was, which HETKV_INIT clears, or the size says that it is not
// there.
static_assert(sizeof(void*) != 8 || sizeof(hetkv_node_config) == 104);
static_assert(sizeof(void*) != 8 || sizeof(hetkv_request_config) == 56);

thread_local std::string last_error;

hetkv_status tell(Result result) {
  if (!result.ok()) last_error = std::move(result.detail);
  return result.status;
}

// Runs a body; what it throws is memory that is not there, or a fault of this library's.
template <typename Body>
hetkv_status guarded(const Body& body) {
  try {
    return tell(body());
  } catch (const std::bad_alloc&) {
    return tell(failure(HETKV_TRANSPORT, "out of memory"));
  } catch (const std::exception& error) {
    return tell(failure(HETKV_UNSUPPORTED, error.what()));
  }
}

Result missing(const char* what) {
  return failure(HETKV_INPUT, std::string(what) + " is NULL");
}

// `../backends` of this library's folder, as the wheel has them.
std::string next_to_library() {
  Dl_info found{};
  if (dladdr(reinterpret_cast<const void*>(&hetkv_version), &found) == 0 || found.dli_fname == nullptr) return "";
  const std::string path = found.dli_fname;
  const std::size_t slash = path.rfind('/');
  return (slash == std::string::npos ? "." : path.substr(0, slash)) + "/../backends";
}

hetkv_status create(Role role, const hetkv_pool* pool, const hetkv_node_config* config, hetkv_node** node) {
  return guarded([&]() -> Result {
    if (pool == nullptr || config == nullptr || node == nullptr) return missing("an argument");
    hetkv::capi::NodeSettings settings;
    Result result = read_settings(*config, *pool->pool, &settings);
    if (!result.ok()) return result;
    if (settings.backends.empty()) settings.backends = next_to_library();
    std::shared_ptr<Node> made;
    result = Node::create(role, pool->pool, std::move(settings), &made);
    if (result.ok()) *node = new hetkv_node{std::move(made)};
    return result;
  });
}

}  // namespace

const char* hetkv_version(void) {
  return HETKV_VERSION;
}

const char* hetkv_error(void) {
  return last_error.c_str();
}

const char* hetkv_status_name(hetkv_status status) {
  switch (status) {
    case HETKV_OK:
      return "OK";
    case HETKV_INPUT:
      return "INPUT";
    case HETKV_MALFORMED:
      return "MALFORMED";
    case HETKV_UNSUPPORTED:
      return "UNSUPPORTED";
    case HETKV_AUTHENTICATION:
      return "AUTHENTICATION";
    case HETKV_CHECKSUM:
      return "CHECKSUM";
    case HETKV_PROTOCOL:
      return "PROTOCOL";
    case HETKV_PEER_LOST:
      return "PEER_LOST";
    case HETKV_LEASE_EXPIRED:
      return "LEASE_EXPIRED";
    case HETKV_ABORTED:
      return "ABORTED";
    case HETKV_TRANSPORT:
      return "TRANSPORT";
    case HETKV_CLOSED:
      return "CLOSED";
    case HETKV_CONTENT:
      return "CONTENT";
    case HETKV_DEVICE:
      return "DEVICE";
    case HETKV_POOL_CHECKSUM:
      return "POOL_CHECKSUM";
    case HETKV_TIMEOUT:
      return "TIMEOUT";
    case HETKV_INCOMPATIBLE:
      return "INCOMPATIBLE";
    case HETKV_VERSION_MISMATCH:
      return "VERSION_MISMATCH";
    case HETKV_HANDSHAKE:
      return "HANDSHAKE";
    case HETKV_MESSAGE:
      return "MESSAGE";
  }
  return "unknown";
}

hetkv_status hetkv_pool_create(const hetkv_pool_config* config, hetkv_pool** pool) {
  return guarded([&]() -> Result {
    if (config == nullptr || pool == nullptr) return missing("an argument");
    std::shared_ptr<const hetkv::capi::Pool> made;
    Result result = hetkv::capi::make_pool(*config, &made);
    if (result.ok()) *pool = new hetkv_pool{std::move(made)};
    return result;
  });
}

void hetkv_pool_free(hetkv_pool* pool) {
  delete pool;
}

hetkv_status hetkv_sender_create(const hetkv_pool* pool, const hetkv_node_config* config, hetkv_node** node) {
  return create(Role::kSender, pool, config, node);
}

hetkv_status hetkv_receiver_create(const hetkv_pool* pool, const hetkv_node_config* config, hetkv_node** node) {
  return create(Role::kReceiver, pool, config, node);
}

void hetkv_node_close(hetkv_node* node) {
  if (node == nullptr) return;
  node->node->close();
  delete node;
}

hetkv_status hetkv_listen(hetkv_node* node, const char* address, char* bound, size_t bound_bytes) {
  return guarded([&]() -> Result {
    if (node == nullptr || address == nullptr || bound == nullptr) return missing("an argument");
    if (bound_bytes < kAddressBytes) return failure(HETKV_INPUT, "bound_bytes must be 64 or more");
    std::string at;
    Result result = node->node->listen(address, &at);
    if (!result.ok()) return result;
    if (at.size() + 1 > bound_bytes) return failure(HETKV_INPUT, "the address does not fit");
    std::memcpy(bound, at.c_str(), at.size() + 1);
    return {};
  });
}

hetkv_status hetkv_connect(hetkv_node* node, const char* address) {
  return guarded([&]() -> Result {
    if (node == nullptr || address == nullptr) return missing("an argument");
    return node->node->connect(address);
  });
}

hetkv_status hetkv_connect_all(hetkv_node* node, const char* const* addresses, size_t count) {
  return guarded([&]() -> Result {
    if (node == nullptr || addresses == nullptr || count == 0) return missing("an argument");
    Result last;
    std::size_t linked = 0;
    for (std::size_t at = 0; at < count; ++at) {
      if (addresses[at] == nullptr) return missing("an address");
      Result result = node->node->connect(addresses[at]);
      if (result.ok()) {
        ++linked;
      } else if (result.status == HETKV_INCOMPATIBLE && result.detail.find(": shard: ") != std::string::npos) {
        last = std::move(result);  // that rank holds nothing of this pool
      } else {
        return result;
      }
    }
    return linked > 0 ? Result() : last;
  });
}

size_t hetkv_num_peers(hetkv_node* node) {
  return node == nullptr ? 0 : node->node->peers();
}

hetkv_status hetkv_send(hetkv_node* sender, const hetkv_request_config* config, hetkv_request** request) {
  return guarded([&]() -> Result {
    if (sender == nullptr || config == nullptr || request == nullptr) return missing("an argument");
    return sender->node->send(*config, request);
  });
}

hetkv_status hetkv_receive(hetkv_node* receiver, const hetkv_request_config* config, hetkv_request** request) {
  return guarded([&]() -> Result {
    if (receiver == nullptr || config == nullptr || request == nullptr) return missing("an argument");
    return receiver->node->receive(*config, request);
  });
}

hetkv_status hetkv_send_layer(hetkv_request* request, uint32_t layer, uint64_t start, uint64_t stop, void* stream) {
  return hetkv_send_batch(&request, 1, layer, &start, &stop, stream);
}

hetkv_status hetkv_send_batch(hetkv_request* const* requests, size_t count, uint32_t layer, const uint64_t* starts,
                              const uint64_t* stops, void* stream) {
  return guarded([&]() -> Result {
    if (requests == nullptr || count == 0) return missing("an argument");
    for (std::size_t at = 0; at < count; ++at) {
      if (requests[at] == nullptr) return missing("a request");
    }
    return requests[0]->node->send_layers(requests, count, layer, starts, stops, stream);
  });
}

hetkv_status hetkv_wait(hetkv_request* request, int64_t timeout_ms) {
  return guarded([&]() -> Result {
    if (request == nullptr) return missing("request");
    return request->node->wait(*request, hetkv::engine::Phase::kComplete, timeout_ms);
  });
}

hetkv_status hetkv_wait_layer(hetkv_request* request, uint32_t layer, int64_t timeout_ms) {
  return guarded([&]() -> Result {
    if (request == nullptr) return missing("request");
    if (request->node->sends()) return failure(HETKV_INPUT, "a layer arrives at a receiver");
    return request->node->wait_layer(*request, layer, timeout_ms);
  });
}

hetkv_status hetkv_wait_packed(hetkv_request* request, int64_t timeout_ms) {
  return guarded([&]() -> Result {
    if (request == nullptr) return missing("request");
    return request->node->wait(*request, hetkv::engine::Phase::kPacked, timeout_ms);
  });
}

size_t hetkv_poll(hetkv_node* node, hetkv_request** requests, size_t most) {
  return node == nullptr || requests == nullptr ? 0 : node->node->poll(requests, most);
}

void hetkv_abort(hetkv_request* request, const char* reason) {
  if (request != nullptr) request->node->abort(*request, reason);
}

void hetkv_request_free(hetkv_request* request) {
  if (request == nullptr) return;
  request->node->forget(*request);
  delete request;
}
