// Binds csrc/backend/: which GPU backends there are, and remaps on their devices for tests and measurements.
#include "backend/backend.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "backend/loader.h"
#include "job.h"

namespace hetkv {
namespace {

// By its name, or, for tests, by the path of its shared object.
const HetkvBackend& backend_of(const std::string& name) {
  const HetkvBackend* backend = nullptr;
  check(name.find('/') == std::string::npos ? backend::find_backend(name, &backend)
                                            : backend::open_backend_at(name, &backend));
  return *backend;
}

py::dict device_info(const std::string& name, std::int32_t device) {
  const HetkvBackend& backend = backend_of(name);
  HetkvDeviceInfo info;
  check(backend::backend_status(backend, backend.device_info(device, &info), "device " + std::to_string(device)));
  return device_facts(info);
}

py::dict pointer_info(const std::string& name, std::uint64_t pointer) {
  const HetkvBackend& backend = backend_of(name);
  HetkvPointerInfo info;
  check(backend::backend_status(backend, backend.pointer_info(reinterpret_cast<const void*>(pointer), &info),
                                "a pointer"));
  return pointer_facts(info);
}

// Jobs on one device, launched any number of times, with their block tables and multipliers in device memory.
class DeviceRemap {
 public:
  DeviceRemap(const std::string& name, std::int32_t device, const std::vector<OwnedJob>& jobs,
              const std::vector<std::uint64_t>& frames)
      : backend_(backend_of(name)), device_(device) {
    std::uint64_t all = 0;
    for (const std::uint64_t count : frames) {
      all += count;
      frames_.push_back({0, count});
    }
    if (frames.empty()) frames_.push_back({0, jobs.size()});
    if (!frames.empty() && all != jobs.size()) throw py::value_error("the frames' jobs are not all jobs");
    std::size_t bytes = 0;
    for (const OwnedJob& job : jobs) {
      bytes += (job.src.blocks.size() + job.dst.blocks.size()) * 4 + job.multipliers.size() * 4;
    }
    try {
      ok(backend_.slot_create(device, &slot_), "making a slot");
      ok(backend_.event_create(device, 0, &event_), "making an event");
      ok(backend_.host_alloc(bytes + 4, &staging_), "making a table");
      ok(backend_.device_alloc(device, bytes + 4, &tables_), "making a table");
      auto* next = static_cast<char*>(staging_);
      for (const OwnedJob& job : jobs) jobs_.push_back(place(job, next));
      void* stream = nullptr;
      ok(backend_.stream_create(device, 0, &stream), "making a stream");
      const std::int32_t copied = backend_.copy_async(tables_, staging_, bytes, stream);
      const std::int32_t done = backend_.stream_synchronize(stream);
      static_cast<void>(backend_.stream_destroy(stream));
      ok(copied, "copying block tables");
      ok(done, "copying block tables");
    } catch (...) {
      release();
      throw;
    }
  }
  ~DeviceRemap() { release(); }
  DeviceRemap(const DeviceRemap&) = delete;
  DeviceRemap& operator=(const DeviceRemap&) = delete;

  void launch(std::uint64_t stream, std::uint64_t seed, std::int32_t max_blocks) {
    void* handle = reinterpret_cast<void*>(stream);
    for (std::size_t i = 0; i < frames_.size(); ++i) frames_[i].seed = seed + i;
    ok(backend_.remap(handle, jobs_.data(), frames_.data(), frames_.size(), &slot_, max_blocks), "launching a remap");
    stream_ = handle;
  }

  std::vector<std::pair<std::uint64_t, std::uint64_t>> results() {
    ok(backend_.event_record(device_, event_, stream_), "recording an event");
    std::int32_t status = 0;
    {
      const py::gil_scoped_release release_gil;
      status = backend_.event_synchronize(event_);
    }
    ok(status, "waiting for a remap");
    std::vector<std::pair<std::uint64_t, std::uint64_t>> found;
    for (std::size_t i = 0; i < frames_.size(); ++i) {
      found.emplace_back(slot_.results[i].checksum, slot_.results[i].saturated);
    }
    return found;
  }

 private:
  void ok(std::int32_t status, const char* what) const { check(backend::backend_status(backend_, status, what)); }

  // Copies `bytes` bytes to `next` and returns where they will be on the device.
  const void* put(const void* data, std::size_t bytes, char*& next) const {
    if (bytes != 0) std::memcpy(next, data, bytes);
    const void* there = static_cast<char*>(tables_) + (next - static_cast<char*>(staging_));
    next += bytes;
    return there;
  }

  hetkv::remap::Job place(const OwnedJob& from, char*& next) const {
    hetkv::remap::Job job = from.view();
    const void* src = put(from.src.blocks.data(), from.src.blocks.size() * 4, next);
    const void* dst = put(from.dst.blocks.data(), from.dst.blocks.size() * 4, next);
    const void* multipliers = put(from.multipliers.data(), from.multipliers.size() * 4, next);
    if (job.src.blocks != nullptr) job.src.blocks = static_cast<const std::int32_t*>(src);
    if (job.dst.blocks != nullptr) job.dst.blocks = static_cast<const std::int32_t*>(dst);
    if (job.multipliers != nullptr) job.multipliers = static_cast<const float*>(multipliers);
    return job;
  }

  void release() {
    if (event_ != nullptr) {
      if (backend_.event_record(device_, event_, stream_) == kHetkvOk)
        static_cast<void>(backend_.event_synchronize(event_));
      static_cast<void>(backend_.event_destroy(event_));
    }
    static_cast<void>(backend_.slot_destroy(&slot_));
    if (staging_ != nullptr) static_cast<void>(backend_.host_free(staging_));
    if (tables_ != nullptr) static_cast<void>(backend_.device_free(device_, tables_));
  }

  const HetkvBackend& backend_;
  std::int32_t device_;
  HetkvRemapSlot slot_{};
  void* event_ = nullptr;
  void* stream_ = nullptr;  // of the last launch
  void* staging_ = nullptr;
  void* tables_ = nullptr;
  std::vector<hetkv::remap::Job> jobs_;
  std::vector<HetkvRemapFrame> frames_;
};

}  // namespace

void bind_backend(py::module_& m) {
  m.def(
      "load_backends",
      [](const std::string& folder) {
        py::list found;
        for (const backend::BackendEntry& entry : backend::load_backends(folder)) {
          found.append(py::make_tuple(entry.name, entry.devices, entry.why));
        }
        return found;
      },
      py::arg("folder"),
      "Opens the GPU backends in `folder`: (name, devices, why none) of each. The first call counts.");
  m.def("device_info", &device_info, py::arg("backend"), py::arg("device"), "What one device is and can do.");
  m.def("pointer_info", &pointer_info, py::arg("backend"), py::arg("pointer"), "What memory an address belongs to.");
  py::class_<DeviceRemap>(
      m, "DeviceRemap", "Jobs on one device. Their memory is device memory, or pinned; their block tables are copied.")
      .def(
          py::init<const std::string&, std::int32_t, const std::vector<OwnedJob>&, const std::vector<std::uint64_t>&>(),
          py::arg("backend"), py::arg("device"), py::arg("jobs"), py::arg("frames") = std::vector<std::uint64_t>(),
          "`frames`: how many of the jobs each frame has; by default all are one frame's.")
      .def("launch", &DeviceRemap::launch, py::arg("stream") = 0, py::arg("seed") = 0, py::arg("max_blocks") = 0,
           "One launch in the order of `stream` (the framework's handle as an integer). Does not wait. Frame i has the "
           "seed `seed + i`.")
      .def("results", &DeviceRemap::results, "Waits for the last launch: (checksum, elements saturated) of each frame.")
      .def("result", [](DeviceRemap& self) { return self.results().front(); }, "The same of the first frame.");
}

}  // namespace hetkv
