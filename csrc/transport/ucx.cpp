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

using Context = std::shared_ptr<ucp_context>;

Status ucx_error(const std::string& what, ucs_status_t status) {
  return Status::error(Code::kTransport, what + ": " + ucs_status_string(status));
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

ucs_memory_type_t memory_type(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kCuda:
      return UCS_MEMORY_TYPE_CUDA;
    case MemoryKind::kRocm:
      return UCS_MEMORY_TYPE_ROCM;
    case MemoryKind::kHost:
      break;
  }
  return UCS_MEMORY_TYPE_HOST;
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

class UcxMemory final : public Memory {
 public:
  static Status make(const Context& context, const ucp_mem_map_params_t& params, std::unique_ptr<Memory>* out) {
    auto self = std::make_unique<UcxMemory>();
    if (auto status = ucp_mem_map(context.get(), &params, &self->handle_); status != UCS_OK) {
      return ucx_error("registering memory", status);
    }
    self->context_ = context;
    ucp_mem_attr_t attributes{};
    attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
    if (auto status = ucp_mem_query(self->handle_, &attributes); status != UCS_OK) {
      return ucx_error("registering memory", status);
    }
    self->address_ = reinterpret_cast<std::uint64_t>(attributes.address);
    self->bytes_ = params.length;
    void* packed = nullptr;
    std::size_t length = 0;
    if (auto status = ucp_rkey_pack(context.get(), self->handle_, &packed, &length); status != UCS_OK) {
      return ucx_error("packing a remote key", status);
    }
    self->key.assign(static_cast<std::uint8_t*>(packed), static_cast<std::uint8_t*>(packed) + length);
    ucp_rkey_buffer_release(packed);
    *out = std::move(self);
    return {};
  }
  ~UcxMemory() override {
    if (handle_ != nullptr) ucp_mem_unmap(context_.get(), handle_);
  }

  std::vector<std::uint8_t> key;

 private:
  Context context_;
  ucp_mem_h handle_ = nullptr;
};

class UcxPeerMemory final : public PeerMemory {
 public:
  UcxPeerMemory(ucp_rkey_h opened, std::uint64_t at) : key(opened), address(at) { rma_ = true; }
  ~UcxPeerMemory() override { ucp_rkey_destroy(key); }

  // Sets `local()` where this process maps the memory.
  Status map(std::size_t bytes) {
    void* mapped = nullptr;
    if (ucp_rkey_ptr(key, address, &mapped) != UCS_OK) return {};
    local_ = reinterpret_cast<std::uint64_t>(mapped);
    if (in_shared_memory(local_, bytes)) return {};
    return Status::error(Code::kProtocol, "the peer granted memory outside of what it shares");
  }

  const ucp_rkey_h key;
  const std::uint64_t address;  // in the peer
};

// A put and the flush behind it: the Op of the caller is done when both are.
struct Put {
  Op* op;
  int left;
};

void start(ucs_status_ptr_t request, void* user, void (*done)(void* user, ucs_status_t status)) {
  if (!UCS_PTR_IS_PTR(request)) done(user, UCS_PTR_STATUS(request));
}

void put_done(void* user, ucs_status_t status) {
  auto* put = static_cast<Put*>(user);
  if (status != UCS_OK && put->op->status.ok()) put->op->status = ucx_error("UCX put", status);
  if (--put->left > 0) return;
  put->op->done = true;
  delete put;
}

void close_done(void* user, ucs_status_t) {
  *static_cast<bool*>(user) = true;
}

void send_done(void* user, ucs_status_t) {
  delete static_cast<std::vector<std::uint8_t>*>(user);
}

template <void (*Done)(void*, ucs_status_t)>
ucp_request_param_t parameters(void* user) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = [](void* request, ucs_status_t status, void* data) {
    Done(data, status);
    ucp_request_free(request);
  };
  param.user_data = user;
  return param;
}

class UcxEndpoint final : public Endpoint {
 public:
  static Status connect(ucp_worker_h worker, const PeerAddress& peer, std::unique_ptr<Endpoint>* out) {
    if (peer.address.empty() || (peer.address[0] & 15) > kNewestAddressVersion) {  // UCX would end the process
      return Status::error(Code::kTransport, "the peer's UCX address has a version that this UCX does not know");
    }
    auto self = std::make_unique<UcxEndpoint>();
    self->link_ = peer.link;
    ucp_ep_params_t params{};
    params.field_mask =
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(peer.address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.arg = self.get();
    params.err_handler.cb = [](void* arg, ucp_ep_h, ucs_status_t status) {
      static_cast<UcxEndpoint*>(arg)->fail(status);
    };
    if (auto status = ucp_ep_create(worker, &params, &self->handle_); status != UCS_OK) {
      return ucx_error("connecting to the peer's UCX address", status);
    }
    *out = std::move(self);
    return {};
  }

  void send(std::vector<std::uint8_t> message) override {
    if (closing_ || !failure_.ok()) return;
    // UCX reads header and message until the send completes, so both travel in one allocation.
    auto owned = std::make_unique<std::vector<std::uint8_t>>(std::move(message));
    const std::size_t size = owned->size();
    owned->resize(size + sizeof link_);
    __builtin_memcpy(owned->data() + size, &link_, sizeof link_);
    auto param = parameters<send_done>(owned.get());
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    auto* request =
        ucp_am_send_nbx(handle_, kMessageId, owned->data() + size, sizeof link_, owned->data(), size, &param);
    if (UCS_PTR_IS_PTR(request)) {
      owned.release();  // send_done deletes it
    } else if (UCS_PTR_IS_ERR(request)) {
      fail(UCS_PTR_STATUS(request));
    }
  }

  void put(const void* source, std::size_t bytes, const PeerMemory& target, Op* op) override {
    *op = {false, {}};
    const auto& at = static_cast<const UcxPeerMemory&>(target);
    auto* put = new Put{op, 2};
    auto param = parameters<put_done>(put);
    start(ucp_put_nbx(handle_, source, bytes, at.address, at.key, &param), put, put_done);
    start(ucp_ep_flush_nbx(handle_, &param), put, put_done);
  }

  Status share(wire::SlotName, const Memory& memory, std::vector<std::uint8_t>* key) override {
    *key = static_cast<const UcxMemory&>(memory).key;
    return {};
  }

  Status open(wire::SlotName, const std::vector<std::uint8_t>& key, std::uint64_t address, std::size_t bytes, bool map,
              std::unique_ptr<PeerMemory>* out) override {
    ucp_rkey_h opened = nullptr;
    if (auto status = ucp_ep_rkey_unpack(handle_, key.data(), &opened); status != UCS_OK) {
      return ucx_error("opening the peer's window", status);
    }
    auto made = std::make_unique<UcxPeerMemory>(opened, address);
    if (map) {
      if (auto status = made->map(bytes); !status.ok()) return status;
    }
    *out = std::move(made);
    return {};
  }

  bool drained() override {
    if (!flushing_) {
      flushing_ = true;
      auto param = parameters<close_done>(&flushed_);
      start(ucp_ep_flush_nbx(handle_, &param), &flushed_, close_done);
    }
    return flushed_;
  }

  void close() override {
    if (closing_) return;
    closing_ = true;
    auto param = parameters<close_done>(&closed_);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    start(ucp_ep_close_nbx(handle_, &param), &closed_, close_done);
  }
  bool closed() const override { return closed_ && (!flushing_ || flushed_); }
  const Status& failure() const override { return failure_; }

 private:
  void fail(ucs_status_t status) {
    if (failure_.ok()) failure_ = Status::error(Code::kPeerLost, std::string("UCX: ") + ucs_status_string(status));
  }

  std::uint64_t link_ = 0;
  ucp_ep_h handle_ = nullptr;
  Status failure_;
  bool flushing_ = false;
  bool flushed_ = false;
  bool closing_ = false;
  bool closed_ = false;
};

}  // namespace

Status UcxTransport::start(Sink* sink) {
  sink_ = sink;
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
  context_.reset(context, ucp_cleanup);

  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  if (auto status = ucp_worker_create(context_.get(), &worker_params, &worker_); status != UCS_OK) {
    return ucx_error("UCX worker", status);
  }
  if (auto status = ucp_worker_get_efd(worker_, &event_fd_); status != UCS_OK) {
    return ucx_error("UCX wakeup", status);
  }
  ucp_am_handler_param_t am{};
  am.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG |
                  UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
  am.id = kMessageId;
  am.cb = &UcxTransport::on_message;
  am.arg = this;
  am.flags = UCP_AM_FLAG_WHOLE_MSG;
  if (auto status = ucp_worker_set_am_recv_handler(worker_, &am); status != UCS_OK) {
    return ucx_error("UCX active messages", status);
  }
  ucp_address_t* address = nullptr;
  std::size_t length = 0;
  if (auto status = ucp_worker_get_address(worker_, &address, &length); status != UCS_OK) {
    return ucx_error("UCX address", status);
  }
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(address);
  address_.assign(bytes, bytes + length);
  ucp_worker_release_address(worker_, address);
  return {};
}

void UcxTransport::close() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  worker_ = nullptr;
}

UcxTransport::~UcxTransport() {
  close();
}

Status UcxTransport::connect(const PeerAddress& peer, std::unique_ptr<Endpoint>* out) {
  return UcxEndpoint::connect(worker_, peer, out);
}

bool UcxTransport::reaches(MemoryKind kind) const {
  ucp_context_attr_t attributes{};
  attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  return ucp_context_query(context_.get(), &attributes) == UCS_OK &&
         (attributes.memory_types & (1ull << memory_type(kind))) != 0;
}

Status UcxTransport::allocate(std::size_t bytes, std::unique_ptr<Memory>* out) {
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.length = bytes;
  params.flags = UCP_MEM_MAP_ALLOCATE;  // UCX picks memory that peers of this host can map
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  return UcxMemory::make(context_, params, out);
}

Status UcxTransport::attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<Memory>* out) {
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = reinterpret_cast<void*>(address);
  params.length = bytes;
  params.memory_type = memory_type(kind);
  return UcxMemory::make(context_, params, out);
}

ucs_status_t UcxTransport::on_message(void* self, const void* header, std::size_t header_size, void* data,
                                      std::size_t size, const ucp_am_recv_param_t* param) {
  // hetkv sends its messages eagerly; a rendezvous descriptor or another header is not hetkv's and is dropped.
  if (header_size != sizeof(std::uint64_t) || (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) return UCS_OK;
  std::uint64_t link;
  __builtin_memcpy(&link, header, sizeof link);
  static_cast<UcxTransport*>(self)->sink_->on_message(link, static_cast<const std::uint8_t*>(data), size);
  return UCS_OK;
}

}  // namespace hetkv::transport
