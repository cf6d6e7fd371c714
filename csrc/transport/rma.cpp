#include "transport/rma.h"

#include <algorithm>
#include <string>
#include <utility>

#include "transport/ucx.h"

namespace hetkv::transport {

#ifdef HETKV_WITH_UCX
namespace {

constexpr unsigned kApiMajor = 1;  // the oldest UCX that hetkv runs on: hetkv/ucx.py
constexpr unsigned kApiMinor = 18;
constexpr int kNewestAddressVersion = 1;  // low four bits of a worker address
constexpr std::size_t kMostLanes = 16;

using Context = std::shared_ptr<ucp_context>;

Status ucx_error(const std::string& what, ucs_status_t status) {
  return Status::error(Code::kTransport, "UCX: " + what + ": " + ucx()->ucs_status_string(status));
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

// One of the names in `list`, or a variant of it: `rc_mlx5` is `rc`.
bool is_listed(const std::string& name, const std::string& list) {
  for (std::size_t at = 0; at <= list.size();) {
    const std::size_t end = std::min(list.find(',', at), list.size());
    const std::string one = list.substr(at, end - at);
    if (name == one || name.rfind(one + "_", 0) == 0) return true;
    at = end + 1;
  }
  return false;
}

class UcxMemory final : public RmaMemory {
 public:
  UcxMemory(Context context, ucp_mem_h handle) : context_(std::move(context)), handle_(handle) {}
  ~UcxMemory() override { ucx()->ucp_mem_unmap(context_.get(), handle_); }

 private:
  const Context context_;
  const ucp_mem_h handle_;
};

class UcxTarget final : public RmaTarget {
 public:
  UcxTarget(ucp_rkey_h opened, std::uint64_t at) : key(opened), address(at) {}
  ~UcxTarget() override { ucx()->ucp_rkey_destroy(key); }
  const ucp_rkey_h key;
  const std::uint64_t address;
};

// A put and the flush after it: the caller's Op is done when both are.
struct Put {
  Op* op;
  int left;
};

void put_done(void* user, ucs_status_t status) {
  auto* put = static_cast<Put*>(user);
  if (status != UCS_OK && put->op->status.ok()) put->op->status = ucx_error("put", status);
  if (--put->left > 0) return;
  put->op->done = true;
  delete put;
}

void set_true(void* user, ucs_status_t) {
  *static_cast<bool*>(user) = true;
}

void start(ucs_status_ptr_t request, void* user, void (*done)(void* user, ucs_status_t status)) {
  if (!UCS_PTR_IS_PTR(request)) done(user, UCS_PTR_STATUS(request));
}

template <void (*Done)(void*, ucs_status_t)>
ucp_request_param_t parameters(void* user) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = [](void* request, ucs_status_t status, void* data) {
    Done(data, status);
    ucx()->ucp_request_free(request);
  };
  param.user_data = user;
  return param;
}

class UcxEndpoint final : public RmaEndpoint {
 public:
  static Status connect(ucp_worker_h worker, const std::vector<std::uint8_t>& address, const std::string& transports,
                        std::unique_ptr<RmaEndpoint>* out) {
    if ((address[0] & 15) > kNewestAddressVersion) {  // UCX would end the process
      return Status::error(Code::kTransport, "the peer's UCX address has a version that this UCX does not know");
    }
    auto self = std::make_unique<UcxEndpoint>();
    ucp_ep_params_t params{};
    params.field_mask =
        UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.arg = self.get();
    params.err_handler.cb = [](void* arg, ucp_ep_h, ucs_status_t status) {
      static_cast<UcxEndpoint*>(arg)->fail(status);
    };
    if (auto status = ucx()->ucp_ep_create(worker, &params, &self->handle_); status != UCS_OK) {
      return ucx_error("connecting to the peer's address", status);
    }
    Status proven = self->prove(transports);
    if (!proven.ok()) self->close();
    *out = std::move(self);  // also then: closing takes time
    return proven;
  }

  Status open(const std::vector<std::uint8_t>& key, std::uint64_t address, std::unique_ptr<RmaTarget>* out) override {
    ucp_rkey_h opened = nullptr;
    if (auto status = ucx()->ucp_ep_rkey_unpack(handle_, key.data(), &opened); status != UCS_OK) {
      return ucx_error("opening the peer's window", status);
    }
    *out = std::make_unique<UcxTarget>(opened, address);
    return {};
  }

  void put(const void* source, std::size_t bytes, const RmaTarget& target, Op* op) override {
    *op = {false, {}};
    const auto& at = static_cast<const UcxTarget&>(target);
    auto* put = new Put{op, 2};
    auto param = parameters<put_done>(put);
    start(ucx()->ucp_put_nbx(handle_, source, bytes, at.address, at.key, &param), put, put_done);
    start(ucx()->ucp_ep_flush_nbx(handle_, &param), put, put_done);
  }

  void close() override {
    if (std::exchange(closing_, true)) return;
    auto param = parameters<set_true>(&closed_);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    start(ucx()->ucp_ep_close_nbx(handle_, &param), &closed_, set_true);
  }
  bool closed() const override { return closed_; }
  const Status& failure() const override { return failure_; }

 private:
  // All lanes are of the transports that were asked for, so that no put is emulated.
  Status prove(const std::string& transports) {
    ucp_transport_entry_t entries[kMostLanes];
    ucp_ep_attr_t attributes{};
    attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
    attributes.transports.entries = entries;
    attributes.transports.num_entries = kMostLanes;
    attributes.transports.entry_size = sizeof entries[0];
    if (auto status = ucx()->ucp_ep_query(handle_, &attributes); status != UCS_OK) {
      return ucx_error("the lanes to the peer", status);
    }
    for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
      const std::string name = entries[i].transport_name;
      if (!is_listed(name, transports)) {
        return Status::error(Code::kTransport, "UCX chose a lane over " + name + ", which is none of " + transports);
      }
    }
    return {};
  }
  void fail(ucs_status_t status) {
    if (failure_.ok())
      failure_ = Status::error(Code::kPeerLost, std::string("UCX: ") + ucx()->ucs_status_string(status));
  }

  ucp_ep_h handle_ = nullptr;
  Status failure_;
  bool closing_ = false;
  bool closed_ = false;
};

class UcxRma final : public Rma {
 public:
  ~UcxRma() override { UcxRma::close(); }

  Status start(const std::string& transports) {
    transports_ = transports;
    ucp_config_t* config = nullptr;
    if (auto status = ucx()->ucp_config_read(nullptr, nullptr, &config); status != UCS_OK) {
      return ucx_error("configuration", status);
    }
    // Not the user's to change: on other transports UCX would emulate what is asked of it.
    const ucs_status_t chosen = ucx()->ucp_config_modify(config, "TLS", transports.c_str());
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
    params.features = UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
    params.name = "hetkv";
    ucp_context_h context = nullptr;
    const auto initialised =
        chosen != UCS_OK ? chosen : ucx()->ucp_init_version(kApiMajor, kApiMinor, &params, config, &context);
    ucx()->ucp_config_release(config);
    if (initialised != UCS_OK) return ucx_error("no transport of " + transports, initialised);
    context_.reset(context, ucx()->ucp_cleanup);
    ucp_worker_params_t worker_params{};
    worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    if (auto status = ucx()->ucp_worker_create(context_.get(), &worker_params, &worker_); status != UCS_OK) {
      return ucx_error("worker", status);
    }
    if (auto status = ucx()->ucp_worker_get_efd(worker_, &event_fd_); status != UCS_OK) {
      return ucx_error("wakeup", status);
    }
    ucp_address_t* address = nullptr;
    std::size_t length = 0;
    if (auto status = ucx()->ucp_worker_get_address(worker_, &address, &length); status != UCS_OK) {
      return ucx_error("address", status);
    }
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(address);
    address_.assign(bytes, bytes + length);
    ucx()->ucp_worker_release_address(worker_, address);
    return {};
  }

  const std::vector<std::uint8_t>& address() const override { return address_; }
  int event_fd() const override { return event_fd_; }
  bool progress() override { return worker_ != nullptr && ucx()->ucp_worker_progress(worker_) != 0; }
  bool arm() override { return ucx()->ucp_worker_arm(worker_) == UCS_OK; }
  void close() override {
    if (worker_ != nullptr) ucx()->ucp_worker_destroy(worker_);
    worker_ = nullptr;
  }

  bool reaches(MemoryKind kind) const override {
    ucp_context_attr_t attributes{};
    attributes.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
    return ucx()->ucp_context_query(context_.get(), &attributes) == UCS_OK &&
           (attributes.memory_types & (1ull << memory_type(kind))) != 0;
  }

  Status attach(std::uint64_t address, std::size_t bytes, MemoryKind kind, std::unique_ptr<RmaMemory>* out) override {
    ucp_mem_map_params_t params{};
    params.field_mask =
        UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
    params.address = reinterpret_cast<void*>(address);
    params.length = bytes;
    params.memory_type = memory_type(kind);
    ucp_mem_h handle = nullptr;
    if (auto status = ucx()->ucp_mem_map(context_.get(), &params, &handle); status != UCS_OK) {
      return ucx_error("registering memory", status);
    }
    auto made = std::make_unique<UcxMemory>(context_, handle);
    void* packed = nullptr;
    std::size_t length = 0;
    if (auto status = ucx()->ucp_rkey_pack(context_.get(), handle, &packed, &length); status != UCS_OK) {
      return ucx_error("packing a remote key", status);
    }
    made->key.assign(static_cast<std::uint8_t*>(packed), static_cast<std::uint8_t*>(packed) + length);
    ucx()->ucp_rkey_buffer_release(packed);
    *out = std::move(made);
    return {};
  }

  Status connect(const std::vector<std::uint8_t>& address, std::unique_ptr<RmaEndpoint>* out) override {
    std::unique_ptr<RmaEndpoint> made;
    const auto status = UcxEndpoint::connect(worker_, address, transports_, &made);
    if (status.ok()) {
      *out = std::move(made);
    } else if (made != nullptr) {
      rejected_.push_back(std::move(made));  // it is closing, which takes until the worker's end at most
    }
    return status;
  }

 private:
  std::string transports_;
  Context context_;  // ended with the last of those that need it
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::vector<std::uint8_t> address_;
  std::vector<std::unique_ptr<RmaEndpoint>> rejected_;
};

}  // namespace

Status open_rma(const std::string& transports, std::unique_ptr<Rma>* out) {
  if (ucx() == nullptr) return Status::error(Code::kTransport, "UCX is not loaded");
  auto made = std::make_unique<UcxRma>();
  if (auto status = made->start(transports); !status.ok()) return status;
  *out = std::move(made);
  return {};
}

#else

Status open_rma(const std::string&, std::unique_ptr<Rma>*) {
  return Status::error(Code::kTransport, "hetkv was built without UCX's headers: it has no RDMA");
}

#endif

}  // namespace hetkv::transport
