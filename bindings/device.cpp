// Binds engine/device.h: the devices of the backends, and what they know of a pointer.
#include "engine/device.h"

#include "backend/loader.h"
#include "bind.h"
#include "engine/window_key.h"

namespace hetkv {
using namespace engine;

py::dict device_facts(const HetkvDeviceInfo& info) {
  py::dict out;
  out["name"] = info.name;
  out["arch"] = info.arch;
  out["pci_bus_id"] = info.pci_bus_id;
  out["total_memory"] = info.total_memory;
  out["l2_bytes"] = info.l2_bytes;
  out["multiprocessors"] = info.multiprocessors;
  out["capabilities"] = names_of(info.capabilities);
  out["driver_version"] = info.driver_version;
  out["runtime_version"] = info.runtime_version;
  out["stream_queues"] = info.stream_queues;
  return out;
}

py::dict pointer_facts(const HetkvPointerInfo& info) {
  py::dict out;
  out["kind"] = name_of(static_cast<HetkvMemoryKind>(info.kind));
  out["device"] = info.device;
  out["base"] = info.base;
  out["bytes"] = info.bytes;
  out["ipc"] = info.ipc != 0;
  return out;
}

namespace {

py::dict describe(const Device& device) {
  py::dict out = device_facts(device.info());
  out["backend"] = device.backend().name;
  out["index"] = device.index();
  out["uuid"] = py::bytes(reinterpret_cast<const char*>(device.info().uuid), sizeof device.info().uuid);
  return out;
}

py::dict pointer_info(const Device& device, std::uint64_t address) {
  HetkvPointerInfo info{};
  check(device.check(device.backend().pointer_info(reinterpret_cast<const void*>(address), &info),
                     "asking about memory"));
  return pointer_facts(info);
}

}  // namespace

void bind_device(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("info", &describe)
      .def("pointer_info", &pointer_info, py::arg("address"));

  m.def(
      "open_device",
      [](const std::string& folder, const std::string& name, int index) {
        const HetkvBackend* backend = nullptr;
        backend::load_backends(folder);
        check(backend::find_backend(name, &backend));
        std::shared_ptr<Device> device;
        check(Device::open(*backend, index, &device));
        return device;
      },
      py::arg("folder"), py::arg("name"), py::arg("index"), py::call_guard<py::gil_scoped_release>(),
      "A device of a backend whose shared object is in `folder`.");
  m.def(
      "process_number",
      [] {
        const auto& number = this_process();
        return py::bytes(reinterpret_cast<const char*>(number.data()), number.size());
      },
      "For tests: the number of this process in the keys of its windows.");
  m.def(
      "open_test_device",
      [](const std::string& path, int index) {
        const HetkvBackend* backend = nullptr;
        check(backend::open_backend_at(path, &backend));
        std::shared_ptr<Device> device;
        check(Device::open(*backend, index, &device));
        return device;
      },
      py::arg("path"), py::arg("index"), "For tests: a device of any shared object with a backend's table.");
}

}  // namespace hetkv
