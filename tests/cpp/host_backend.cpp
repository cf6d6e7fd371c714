// A backend whose devices are threads of this host: the whole contract of csrc/backend/backend.h, with real asynchrony,
// so that everything above the kernels (order of streams, events, drains, slots in quarantine) runs where there is no
// GPU. It implements the contract; it does not stand in for the kernels, which have tests of their own. Its remap is
// the definition in csrc/map.h, csrc/convert.h and csrc/remap/checksum.h, element by element.
//
// A stream is a thread that executes its queue in order; an event is done when the queue has come to it. "Device"
// memory is shared memory in a file, so that another process can open it through an IPC handle, as with a real driver.
//
// `host_options`, or HETKV_HOST_BACKEND in the environment, a comma-separated list, changes what it does:
//   slow=US        every remap takes at least so long
//   memory=BYTES   device memory that may be allocated from now on (default 1 GiB)
//   no-ipc         ipc_export is unsupported
//   no-peer        ipc_open and enable_peer fail
//   no-register    host_register fails
//   no-wait-value  stream_wait_value is unsupported
//   fail-remap=N   the N-th remap and all later ones fail on the device: their event reports it
//   refuse-remap=N the N-th remap is refused by the driver when it is launched
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.h"
#include "convert.h"
#include "remap/checksum.h"

namespace {

using namespace hetkv;

constexpr int kDevices = 2;
thread_local std::string error_text;
std::atomic<int> remaps{0};
std::atomic<bool> broken{false};
std::mutex options_mutex;
std::string options = std::getenv("HETKV_HOST_BACKEND") != nullptr ? std::getenv("HETKV_HOST_BACKEND") : "";

std::int32_t fail(std::int32_t status, const std::string& text) {
  error_text = text;
  return status;
}

// Value of one word of HETKV_HOST_BACKEND: -1 where it is not there, 0 where it has no value.
long option(const std::string& name) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  std::string rest = options;
  while (!rest.empty()) {
    const auto end = rest.find(',');
    const std::string word = rest.substr(0, end);
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
    if (word == name) return 0;
    if (word.rfind(name + "=", 0) == 0) return std::atol(word.c_str() + name.size() + 1);
  }
  return -1;
}

bool has(const char* name) {
  return option(name) >= 0;
}

// One recording of an event: who waits for it is not concerned by later ones.
struct Point {
  std::atomic<bool> reached{false};
  std::atomic<std::uint64_t> at_ns{0};
  std::atomic<bool> failed{false};
};
class Event {
 public:
  std::shared_ptr<Point> point() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return point_;
  }
  std::shared_ptr<Point> record() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return point_ = std::make_shared<Point>();
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Point> point_ = [] {
    auto none = std::make_shared<Point>();
    none->reached = true;
    return none;
  }();
};

class Stream {
 public:
  explicit Stream(int device) : device(device), thread_([this] { run(); }) {}
  ~Stream() {
    put(nullptr);
    thread_.join();
  }
  void put(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return queue_.empty() && !running_; });
  }
  const int device;
  std::atomic<bool> capturing{false};

 private:
  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        running_ = false;
        changed_.notify_all();
        changed_.wait(lock, [this] { return !queue_.empty(); });
        work = std::move(queue_.front());
        queue_.pop_front();
        running_ = true;
      }
      if (!work) return;
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool running_ = false;
  std::thread thread_;
};

// Everything that is allocated, registered or opened, by address.
struct Block {
  std::int32_t kind = kHetkvMemoryDevice;
  int device = 0;
  std::size_t bytes = 0;
  std::string file;
  int opened = 0;
};
std::mutex blocks_mutex;
std::map<std::uint64_t, Block> blocks;
std::size_t used = 0;
std::size_t used_before = 0;  // when the options were set

template <typename T>
std::uint64_t number(T* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

std::map<std::uint64_t, Block>::iterator find_block(std::uint64_t address) {
  auto at = blocks.upper_bound(address);
  if (at == blocks.begin()) return blocks.end();
  --at;
  return address < at->first + at->second.bytes ? at : blocks.end();
}

void* map_file(const std::string& file, std::size_t bytes, bool make) {
  const int fd = open(file.c_str(), make ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
  if (fd < 0) return nullptr;
  if (make && ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    close(fd);
    return nullptr;
  }
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return data == MAP_FAILED ? nullptr : data;
}

const char* last_error() {
  return error_text.c_str();
}

std::int32_t device_count(std::int32_t* count) {
  *count = kDevices;
  return kHetkvOk;
}

std::int32_t device_info(std::int32_t device, HetkvDeviceInfo* info) {
  if (device < 0 || device >= kDevices) return fail(kHetkvNoDevice, "no such device");
  *info = {};
  std::strcpy(info->name, "threads of this host");
  std::strcpy(info->arch, "host");
  info->total_memory = 1ull << 30;
  info->uuid[0] = static_cast<std::uint8_t>(device + 1);
  info->capabilities = kHetkvCapHostRegister | kHetkvCapHostSamePointer | kHetkvCapStreamDevice;
  if (!has("no-ipc")) info->capabilities |= kHetkvCapIpc;
  if (!has("no-wait-value")) info->capabilities |= kHetkvCapStreamWaitValue;
  info->multiprocessors = 1;
  return kHetkvOk;
}

std::int32_t memory_info(std::int32_t, std::uint64_t* free_bytes, std::uint64_t* total_bytes) {
  *total_bytes = 1ull << 30;
  *free_bytes = *total_bytes - used;
  return kHetkvOk;
}

std::int32_t can_access_peer(std::int32_t, std::int32_t, std::int32_t* can) {
  *can = has("no-peer") ? 0 : 1;
  return kHetkvOk;
}

std::int32_t enable_peer(std::int32_t, std::int32_t) {
  return has("no-peer") ? fail(kHetkvUnsupported, "no peer access") : kHetkvOk;
}

// Memory that the backend did not allocate is taken for a tensor of device 0, as these lie in host memory here.
std::int32_t pointer_info(const void* pointer, HetkvPointerInfo* info) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = find_block(number(pointer));
  *info = {};
  info->device_pointer = number(pointer);
  if (at == blocks.end()) {
    info->kind = kHetkvMemoryDevice;
    info->ipc = 1;
    return kHetkvOk;
  }
  info->kind = at->second.kind;
  info->device = at->second.device;
  info->base = at->first;
  info->bytes = at->second.bytes;
  info->ipc = at->second.file.empty() ? 0 : 1;
  return kHetkvOk;
}

std::int32_t device_alloc(std::int32_t device, std::size_t bytes, void** pointer) {
  static std::atomic<int> made{0};
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const long most = option("memory");
  if (used + bytes > used_before + (most >= 0 ? static_cast<std::size_t>(most) : std::size_t{1} << 30)) {
    return fail(kHetkvOutOfMemory, "out of memory");
  }
  Block block;
  block.device = device;
  block.bytes = bytes;
  block.file = "/dev/shm/hetkv-test-" + std::to_string(getpid()) + "-" + std::to_string(++made);
  *pointer = map_file(block.file, bytes, true);
  if (*pointer == nullptr) return fail(kHetkvOutOfMemory, "no shared memory");
  used += bytes;
  blocks[number(*pointer)] = block;
  return kHetkvOk;
}

std::int32_t device_free(std::int32_t, void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = blocks.find(number(pointer));
  if (at == blocks.end()) return fail(kHetkvInvalid, "not allocated");
  munmap(pointer, at->second.bytes);
  unlink(at->second.file.c_str());
  used -= at->second.bytes;
  blocks.erase(at);
  return kHetkvOk;
}

std::int32_t host_alloc(std::size_t bytes, void** pointer) {
  *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks[number(*pointer)] = {kHetkvMemoryPinned, -1, bytes, "", 0};
  return kHetkvOk;
}

std::int32_t host_free(void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks.erase(number(pointer));
  std::free(pointer);
  return kHetkvOk;
}

std::int32_t host_register(std::int32_t, void* pointer, std::size_t bytes, void** device_pointer) {
  if (has("no-register")) return fail(kHetkvFailed, "cannot pin that");
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  if (blocks.count(number(pointer)) != 0) return fail(kHetkvInvalid, "pinned already");
  blocks[number(pointer)] = {kHetkvMemoryPinned, -1, bytes, "", 0};
  *device_pointer = pointer;
  return kHetkvOk;
}

std::int32_t host_unregister(void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  return blocks.erase(number(pointer)) == 1 ? kHetkvOk : fail(kHetkvInvalid, "not pinned");
}

std::int32_t ipc_export(const void* pointer, HetkvIpcHandle* handle) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = find_block(number(pointer));
  if (has("no-ipc") || at == blocks.end() || at->second.file.empty()) return fail(kHetkvUnsupported, "no handle");
  *handle = {};
  std::strncpy(reinterpret_cast<char*>(handle->bytes), at->second.file.c_str(), sizeof handle->bytes - 1);
  handle->offset = number(pointer) - at->first;
  handle->length = at->second.bytes;
  return kHetkvOk;
}

std::int32_t ipc_open(std::int32_t, const HetkvIpcHandle* handle, void** pointer) {
  if (has("no-peer")) return fail(kHetkvUnsupported, "no peer access");
  void* data = map_file(reinterpret_cast<const char*>(handle->bytes), handle->length, false);
  if (data == nullptr) return fail(kHetkvInvalid, "no such memory");
  *pointer = static_cast<std::uint8_t*>(data) + handle->offset;
  return kHetkvOk;
}

std::int32_t ipc_close(std::int32_t, const HetkvIpcHandle* handle, void* pointer) {
  munmap(static_cast<std::uint8_t*>(pointer) - handle->offset, handle->length);
  return kHetkvOk;
}

std::int32_t stream_create(std::int32_t device, std::int32_t, void** stream) {
  *stream = new Stream(device);
  return kHetkvOk;
}

std::int32_t stream_destroy(void* stream) {
  delete static_cast<Stream*>(stream);
  return kHetkvOk;
}

std::int32_t stream_synchronize(void* stream) {
  static_cast<Stream*>(stream)->wait();
  return kHetkvOk;
}

std::int32_t stream_device(void* stream, std::int32_t* device) {
  *device = static_cast<Stream*>(stream)->device;
  return kHetkvOk;
}

std::int32_t stream_is_capturing(void* stream, std::int32_t* capturing) {
  *capturing = static_cast<Stream*>(stream)->capturing ? 1 : 0;
  return kHetkvOk;
}

void nap() {
  std::this_thread::sleep_for(std::chrono::microseconds(20));
}

std::int32_t stream_wait_event(void* stream, void* handle) {
  static_cast<Stream*>(stream)->put([point = static_cast<Event*>(handle)->point()] {
    while (!point->reached) nap();
  });
  return kHetkvOk;
}

std::int32_t event_create(std::int32_t, std::int32_t, void** event) {
  *event = new Event;
  return kHetkvOk;
}

std::int32_t event_destroy(void* event) {
  delete static_cast<Event*>(event);
  return kHetkvOk;
}

std::int32_t event_record(void* handle, void* stream) {
  static_cast<Stream*>(stream)->put([point = static_cast<Event*>(handle)->record()] {
    point->failed = broken.load();
    point->at_ns = static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
    point->reached = true;
  });
  return kHetkvOk;
}

std::int32_t event_query(void* handle) {
  const auto point = static_cast<Event*>(handle)->point();
  if (!point->reached) return kHetkvNotReady;
  return point->failed ? fail(kHetkvFailed, "a kernel failed") : kHetkvOk;
}

std::int32_t event_synchronize(void* handle) {
  while (event_query(handle) == kHetkvNotReady) nap();
  return event_query(handle);
}

std::int32_t event_elapsed_us(void* start, void* stop, double* microseconds) {
  const std::uint64_t first = static_cast<Event*>(start)->point()->at_ns;
  *microseconds = static_cast<double>(static_cast<Event*>(stop)->point()->at_ns - first) / 1000;
  return kHetkvOk;
}

std::int32_t exchange_capture_mode(std::int32_t, std::int32_t*) {
  return fail(kHetkvUnsupported, "there are no graphs here");
}

std::int32_t copy_async(void* dst, const void* src, std::size_t bytes, void* stream) {
  static_cast<Stream*>(stream)->put([=] { std::memcpy(dst, src, bytes); });
  return kHetkvOk;
}

std::int32_t fill_async(void* dst, std::int32_t byte, std::size_t bytes, void* stream) {
  static_cast<Stream*>(stream)->put([=] { std::memset(dst, byte, bytes); });
  return kHetkvOk;
}

std::int32_t flush_rdma_writes(std::int32_t) {
  return fail(kHetkvUnsupported, "no RDMA here");
}

std::int32_t slot_create(std::int32_t device, HetkvRemapSlot* slot) {
  *slot = {new HetkvRemapResult{}, nullptr, device};
  return kHetkvOk;
}

std::int32_t slot_destroy(HetkvRemapSlot* slot) {
  delete slot->result;
  return kHetkvOk;
}

std::uint32_t load(std::uint64_t from, int size) {
  std::uint32_t code = 0;
  std::memcpy(&code, reinterpret_cast<const void*>(from), static_cast<std::size_t>(size));
  return code;
}

void run_job(const RemapJob& job, std::uint64_t seed, RemapResult* result) {
  const DType from = job.src.map.dtype;
  const DType to = job.dst.map.dtype;
  const bool moves = from == to && job.multipliers == nullptr;
  for (std::int32_t head = 0; head < job.heads; ++head) {
    for (std::int64_t token = 0; token < job.tokens; ++token) {
      for (std::int32_t channel = 0; channel < job.channels; ++channel) {
        const auto at = [&](const RemapSide& side) {
          return address(side.map, side.blocks, side.first_token + token, side.first_head + head, channel);
        };
        std::uint32_t code = load(at(job.src), item_size(from));
        if (!moves) {
          const float scale = job.multipliers != nullptr ? job.multipliers[head] : 1.0f;
          bool saturated = false;
          code = encode(format_of(to), decode(format_of(from), code) * scale, &saturated);
          result->saturated += saturated ? 1 : 0;
        }
        std::memcpy(reinterpret_cast<void*>(at(job.dst)), &code, static_cast<std::size_t>(item_size(to)));
      }
    }
  }
  if (job.wire == WireSide::kNone) return;
  const SegmentMap& wire = job.wire == WireSide::kDestination ? job.dst.map : job.src.map;
  const std::int64_t bytes = job.tokens * job.heads * job.channels * item_size(wire.dtype);
  for (std::int64_t at = 0; at < bytes; at += 8) {
    std::uint64_t word = 0;
    auto* data = reinterpret_cast<std::uint8_t*>(wire.base + static_cast<std::uint64_t>(at));
    std::memcpy(&word, data, static_cast<std::size_t>(std::min<std::int64_t>(8, bytes - at)));
    if (job.wire == WireSide::kDestination) std::memcpy(data, &word, 8);
    result->checksum += checksum_mix(word, (job.wire_offset + static_cast<std::uint64_t>(at)) / 8, seed);
  }
}

std::int32_t remap(void* stream, const RemapJob* jobs, std::size_t num_jobs, std::uint64_t seed,
                   const HetkvRemapSlot* slot, std::int32_t) {
  const int turn = ++remaps;
  if (option("refuse-remap") == turn) return fail(kHetkvFailed, "launch refused");
  auto* result = const_cast<HetkvRemapResult*>(slot->result);
  const bool breaks = option("fail-remap") > 0 && turn >= option("fail-remap");
  static_cast<Stream*>(stream)->put([work = std::vector<RemapJob>(jobs, jobs + num_jobs), seed, result, breaks] {
    if (const long us = option("slow"); us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
    if (breaks) broken = true;
    if (broken) return;
    RemapResult sum;
    for (const RemapJob& job : work) run_job(job, seed, &sum);
    *result = {sum.checksum, 0, sum.saturated};
  });
  return kHetkvOk;
}

std::int32_t stream_wait_value(std::int32_t, void* stream, const std::uint32_t* word, std::uint32_t value) {
  if (has("no-wait-value")) return fail(kHetkvUnsupported, "streams cannot wait for the host");
  static_cast<Stream*>(stream)->put([=] {
    while (static_cast<std::int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0) nap();
  });
  return kHetkvOk;
}

std::int32_t bind_thread(std::int32_t) {
  return kHetkvOk;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const HetkvBackend* hetkv_backend() {
  static const HetkvBackend table = {HETKV_BACKEND_ABI,
                                     sizeof(HetkvBackend),
                                     sizeof(RemapJob),
                                     0,
                                     "cuda",
                                     last_error,
                                     device_count,
                                     device_info,
                                     memory_info,
                                     can_access_peer,
                                     enable_peer,
                                     pointer_info,
                                     device_alloc,
                                     device_free,
                                     host_alloc,
                                     host_free,
                                     host_register,
                                     host_unregister,
                                     ipc_export,
                                     ipc_open,
                                     ipc_close,
                                     stream_create,
                                     stream_destroy,
                                     stream_synchronize,
                                     stream_device,
                                     stream_is_capturing,
                                     stream_wait_event,
                                     event_create,
                                     event_destroy,
                                     event_record,
                                     event_query,
                                     event_synchronize,
                                     event_elapsed_us,
                                     exchange_capture_mode,
                                     copy_async,
                                     fill_async,
                                     flush_rdma_writes,
                                     slot_create,
                                     slot_destroy,
                                     remap,
                                     stream_wait_value,
                                     bind_thread};
  return &table;
}

// For the tests: a caller's stream, work of a given length in it, and what is left allocated.
__attribute__((visibility("default"))) void* host_stream(int device) {
  return new Stream(device);
}
__attribute__((visibility("default"))) void host_stream_delay(void* stream, int microseconds) {
  static_cast<Stream*>(stream)->put([=] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); });
}
__attribute__((visibility("default"))) void host_stream_fill(void* stream, void* data, int byte, std::size_t bytes) {
  static_cast<Stream*>(stream)->put([=] { std::memset(data, byte, bytes); });
}
__attribute__((visibility("default"))) void host_stream_copy(void* stream, void* to, const void* from,
                                                             std::size_t bytes) {
  static_cast<Stream*>(stream)->put([=] { std::memcpy(to, from, bytes); });
}
__attribute__((visibility("default"))) void host_stream_capture(void* stream, int on) {
  static_cast<Stream*>(stream)->capturing = on != 0;
}
__attribute__((visibility("default"))) void host_stream_wait(void* stream) {
  static_cast<Stream*>(stream)->wait();
}
__attribute__((visibility("default"))) void host_stream_free(void* stream) {
  delete static_cast<Stream*>(stream);
}
__attribute__((visibility("default"))) std::size_t host_blocks_in_use() {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  return blocks.size();
}
__attribute__((visibility("default"))) void host_options(const char* text) {
  const std::lock_guard<std::mutex> lock(options_mutex);
  options = text;
  broken = false;
  remaps = 0;
  const std::lock_guard<std::mutex> blocks_lock(blocks_mutex);
  used_before = used;
}
}
