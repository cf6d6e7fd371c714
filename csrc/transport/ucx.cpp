#include "transport/ucx.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

namespace hetkv::transport {
namespace {

constexpr unsigned kApiMajor = 1;  // the oldest UCX that hetkv runs on: hetkv/ucx.py
constexpr unsigned kApiMinor = 18;
constexpr unsigned kMessageId = 1;
constexpr int kNewestAddressVersion = 1;  // low four bits of a worker address

Status ucx_error(const char* what, ucs_status_t status) {
  return Status::error(Code::kTransport, std::string(what) + ": " + ucs_status_string(status));
}

// hetkv's own UCX settings; what the user's environment sets wins.
void configure(ucp_config_t* config) {
  static constexpr const char* kSettings[][2] = {{"POSIX_ERROR_HANDLING", "y"}, {"SYSV_ERROR_HANDLING", "y"}};
  for (const auto& setting : kSettings) {
    if (std::getenv((std::string("UCX_") + setting[0]).c_str()) == nullptr) {
      static_cast<void>(ucp_config_modify(config, setting[0], setting[1]));  // an older UCX may not know it
    }
  }
}

// UCX believes the address of a grant; a store outside of what the peer shares would hit this process's own memory.
bool in_shared_memory(std::uint64_t start, std::uint64_t bytes) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long low = 0;
    unsigned long long high = 0;
    char access[5] = {};
    if (std::sscanf(line.c_str(), "%llx-%llx %4s", &low, &high, access) != 3) continue;
    if (start >= low && start < high) return access[1] == 'w' && access[3] == 's' && bytes <= high - start;
  }
  return false;
}

void on_done(void* request, ucs_status_t status, void* user) {
  auto* op = static_cast<Op*>(user);
  op->status = status;
  op->done = true;
  ucp_request_free(request);
}

void on_sent(void* request, ucs_status_t, void* user) {
  delete static_cast<std::vector<std::uint8_t>*>(user);
  ucp_request_free(request);
}

void start(ucs_status_ptr_t request, Op* op) {
  if (!UCS_PTR_IS_PTR(request)) {
    op->status = UCS_PTR_STATUS(request);
    op->done = true;
  }
}

ucp_request_param_t parameters(Op* op) {
  op->done = false;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = on_done;
  param.user_data = op;
  return param;
}

}  // namespace

Status Worker::create(MessageHandler handler, std::unique_ptr<Worker>* out) {
  std::unique_ptr<Worker> self(new Worker);
  self->handler_ = std::move(handler);
  ucp_config_t* config = nullptr;
  if (auto status = ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) {
    return ucx_error("UCX configuration", status);
  }
  configure(config);
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  params.name = "hetkv";
  ucp_context_h context = nullptr;
  const auto initialised = ucp_init_version(kApiMajor, kApiMinor, &params, config, &context);
  ucp_config_release(config);
  if (initialised != UCS_OK) return ucx_error("UCX start", initialised);
  self->context_.reset(context, ucp_cleanup);

  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  if (auto status = ucp_worker_create(self->context_.get(), &worker_params, &self->handle_); status != UCS_OK) {
    return ucx_error("UCX worker", status);
  }
  if (auto status = ucp_worker_get_efd(self->handle_, &self->event_fd_); status != UCS_OK) {
    return ucx_error("UCX wakeup", status);
  }
  ucp_am_handler_param_t am{};
  am.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG |
                  UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
  am.id = kMessageId;
  am.cb = &Worker::on_message;
  am.arg = self.get();
  am.flags = UCP_AM_FLAG_WHOLE_MSG;
  if (auto status = ucp_worker_set_am_recv_handler(self->handle_, &am); status != UCS_OK) {
    return ucx_error("UCX active messages", status);
  }
  ucp_address_t* address = nullptr;
  std::size_t length = 0;
  if (auto status = ucp_worker_get_address(self->handle_, &address, &length); status != UCS_OK) {
    return ucx_error("UCX address", status);
  }
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(address);
  self->address_.assign(bytes, bytes + length);
  ucp_worker_release_address(self->handle_, address);
  *out = std::move(self);
  return {};
}

void Worker::close() {
  if (handle_ != nullptr) ucp_worker_destroy(handle_);
  handle_ = nullptr;
}

bool Worker::reaches(ucs_memory_type_t type) const {
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  return ucp_context_query(context_.get(), &attributes) == UCS_OK && (attributes.memory_types & (1ull << type)) != 0;
}

Worker::~Worker() {
  close();
}

ucs_status_t Worker::on_message(void* self, const void* header, std::size_t header_size, void* data, std::size_t size,
                                const ucp_am_recv_param_t* param) {
  // hetkv sends its messages eagerly; a rendezvous descriptor or another header is not hetkv's and is dropped.
  if (header_size != sizeof(std::uint64_t) || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) return UCS_OK;
  std::uint64_t link;
  __builtin_memcpy(&link, header, sizeof link);
  static_cast<Worker*>(self)->handler_(link, static_cast<const std::uint8_t*>(data), size);
  return UCS_OK;
}

Status Memory::allocate(Worker& worker, std::size_t bytes, std::unique_ptr<Memory>* out) {
  std::unique_ptr<Memory> self(new Memory);
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS |
                      UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.length = bytes;
  params.flags = UCP_MEM_MAP_ALLOCATE;  // UCX picks memory that peers of this host can map
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  if (auto status = ucp_mem_map(worker.context().get(), &params, &self->handle_); status != UCS_OK) {
    return ucx_error("registering memory", status);
  }
  self->context_ = worker.context();
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  if (auto status = ucp_mem_query(self->handle_, &attributes); status != UCS_OK) {
    return ucx_error("registering memory", status);
  }
  self->address_ = reinterpret_cast<std::uint64_t>(attributes.address);
  self->bytes_ = bytes;
  if (auto status = self->pack_key(); !status.ok()) return status;
  *out = std::move(self);
  return {};
}

Status Memory::map(Worker& worker, std::uint64_t address, std::size_t bytes, ucs_memory_type_t type,
                   std::unique_ptr<Memory>* out) {
  std::unique_ptr<Memory> self(new Memory);
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = reinterpret_cast<void*>(address);
  params.length = bytes;
  params.memory_type = type;
  if (auto status = ucp_mem_map(worker.context().get(), &params, &self->handle_); status != UCS_OK) {
    return ucx_error("registering memory", status);
  }
  self->context_ = worker.context();
  self->address_ = address;
  self->bytes_ = bytes;
  if (auto status = self->pack_key(); !status.ok()) return status;
  *out = std::move(self);
  return {};
}

Status Memory::pack_key() {
  void* packed = nullptr;
  std::size_t length = 0;
  if (auto status = ucp_rkey_pack(context_.get(), handle_, &packed, &length); status != UCS_OK) {
    return ucx_error("packing a remote key", status);
  }
  rkey_.assign(static_cast<std::uint8_t*>(packed), static_cast<std::uint8_t*>(packed) + length);
  ucp_rkey_buffer_release(packed);
  return {};
}

Memory::~Memory() {
  if (handle_ != nullptr) ucp_mem_unmap(context_.get(), handle_);
}

RemoteMemory::~RemoteMemory() {
  if (key != nullptr) ucp_rkey_destroy(key);
}

Status Endpoint::connect(Worker& worker, const std::vector<std::uint8_t>& peer, std::unique_ptr<Endpoint>* out) {
  if (peer.empty() || (peer[0] & 15) > kNewestAddressVersion) {  // UCX would end the process
    return Status::error(Code::kTransport, "the peer's UCX address has a version that this UCX does not know");
  }
  std::unique_ptr<Endpoint> self(new Endpoint);
  ucp_ep_params_t params{};
  params.field_mask =
      UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(peer.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.arg = self.get();
  params.err_handler.cb = [](void* arg, ucp_ep_h, ucs_status_t status) {
    auto* endpoint = static_cast<Endpoint*>(arg);
    endpoint->failed_ = true;
    endpoint->failure_ = status;
  };
  if (auto status = ucp_ep_create(worker.handle(), &params, &self->handle_); status != UCS_OK) {
    return ucx_error("connecting to the peer's UCX address", status);
  }
  *out = std::move(self);
  return {};
}

Endpoint::~Endpoint() = default;  // the owner has seen closed(), or destroys the worker, which closes all endpoints

Status Endpoint::open(const std::vector<std::uint8_t>& rkey, std::uint64_t address, std::size_t bytes, bool map,
                      std::unique_ptr<RemoteMemory>* out) {
  auto self = std::make_unique<RemoteMemory>();
  self->address = address;
  self->bytes = bytes;
  if (auto status = ucp_ep_rkey_unpack(handle_, rkey.data(), &self->key); status != UCS_OK) {
    return ucx_error("opening the peer's window", status);
  }
  void* local = nullptr;
  if (map && ucp_rkey_ptr(self->key, address, &local) == UCS_OK) self->local = reinterpret_cast<std::uint64_t>(local);
  if (self->local != 0 && !in_shared_memory(self->local, bytes)) {
    return Status::error(Code::kProtocol, "the peer granted memory outside of what it shares");
  }
  *out = std::move(self);
  return {};
}

void Endpoint::put(const void* source, std::size_t bytes, const RemoteMemory& target, std::size_t offset, Op* op) {
  auto param = parameters(op);
  start(ucp_put_nbx(handle_, source, bytes, target.address + offset, target.key, &param), op);
}

void Endpoint::flush(Op* op) {
  auto param = parameters(op);
  start(ucp_ep_flush_nbx(handle_, &param), op);
}

void Endpoint::send(std::uint64_t link, std::vector<std::uint8_t> message) {
  if (closing_ || failed_) return;
  // UCX reads header and message until the send completes, so both travel in one allocation.
  auto owned = std::make_unique<std::vector<std::uint8_t>>(std::move(message));
  const std::size_t size = owned->size();
  owned->resize(size + sizeof link);
  __builtin_memcpy(owned->data() + size, &link, sizeof link);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  param.cb.send = on_sent;
  param.user_data = owned.get();
  auto* request = ucp_am_send_nbx(handle_, kMessageId, owned->data() + size, sizeof link, owned->data(), size, &param);
  if (UCS_PTR_IS_PTR(request)) {
    owned.release();  // on_sent deletes it
  } else if (UCS_PTR_IS_ERR(request)) {
    failed_ = true;
    failure_ = UCS_PTR_STATUS(request);
  }
}

void Endpoint::close() {
  if (closing_) return;
  closing_ = true;
  auto param = parameters(&close_);
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  start(ucp_ep_close_nbx(handle_, &param), &close_);
}

}  // namespace hetkv::transport
