// UCX's functions, found in a library that is loaded at run time: hetkv needs none where no link uses RDMA.
#pragma once

#include "status.h"

#ifdef HETKV_WITH_UCX
#include <ucp/api/ucp.h>
#endif

namespace hetkv::transport {

// Loads the `libucp` at `path` for open_rma(). Call once, before it. kTransport: it cannot be loaded, or lacks a
// function.
Status load_ucx(const char* path);

#ifdef HETKV_WITH_UCX
#define HETKV_UCX_FUNCTIONS(X)  \
  X(ucp_config_read)            \
  X(ucp_config_modify)          \
  X(ucp_config_release)         \
  X(ucp_init_version)           \
  X(ucp_cleanup)                \
  X(ucp_context_query)          \
  X(ucp_worker_create)          \
  X(ucp_worker_destroy)         \
  X(ucp_worker_get_efd)         \
  X(ucp_worker_get_address)     \
  X(ucp_worker_release_address) \
  X(ucp_worker_progress)        \
  X(ucp_worker_arm)             \
  X(ucp_mem_map)                \
  X(ucp_mem_unmap)              \
  X(ucp_rkey_pack)              \
  X(ucp_rkey_buffer_release)    \
  X(ucp_rkey_destroy)           \
  X(ucp_ep_create)              \
  X(ucp_ep_query)               \
  X(ucp_ep_rkey_unpack)         \
  X(ucp_ep_flush_nbx)           \
  X(ucp_ep_close_nbx)           \
  X(ucp_put_nbx)                \
  X(ucp_request_free)

struct Ucx {
#define HETKV_FIELD(name) decltype(&::name) name = nullptr;
  HETKV_UCX_FUNCTIONS(HETKV_FIELD)
#undef HETKV_FIELD
  const char* (*ucs_status_string)(ucs_status_t) = nullptr;
};

// Null before load_ucx().
const Ucx* ucx();
#endif

}  // namespace hetkv::transport
