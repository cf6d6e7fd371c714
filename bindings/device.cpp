// Binds engine/device.h: the devices of the backends, and what they know of a pointer.
#include "engine/device.h"

#include "backend/loader.h"
#include "bind.h"
#include "engine/window_key.h"

namespace hetkv {
using namespace engine;
namespace {

const char* kind_name(std::int32_t kind) {
  switch (kind) {
    case kHetkvMemoryPinned:
      return "pinned";
    case kHetkvMemoryDevice:
      return "device";
    case kHetkvMemoryManaged:
      return "managed";
    default:
      return "host";
  }
}

py::dict describe(const Device& device) {
  const HetkvDeviceInfo& info = device.info();
  py::dict out;
  out["backend"] = device.backend().name;
  out["index"] = device.index();
  out["name"] = info.name;
  out["arch"] = info.arch;
  out["pci_bus_id"] = info.pci_bus_id;
  out["uuid"] = py::bytes(reinterpret_cast<const char*>(info.uuid), sizeof info.uuid);
  out["total_memory"] = info.total_memory;
  out["driver_version"] = info.driver_version;
  out["runtime_version"] = info.runtime_version;
  out["capabilities"] = info.capabilities;
  return out;
}

py::dict pointer_info(const Device& device, std::uint64_t address) {
  HetkvPointerInfo info{};
  check(device.check(device.backend().pointer_info(reinterpret_cast<const void*>(address), &info),
                     "asking about memory"));
  py::dict out;
  out["kind"] = kind_name(info.kind);
  out["device"] = info.device;
  out["base"] = info.base;
  out["bytes"] = info.bytes;
  out["ipc"] = info.ipc != 0;
  return out;
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
        load_backends(folder);
        check(find_backend(name, &backend));
        std::shared_ptr<Device> device;
        check(Device::open(*backend, index, &device));
        return device;
      },
      py::arg("folder"), py::arg("name"), py::arg("index"), py::call_guard<py::gil_scoped_release>(),
      "A device of a backend whose shared object lies in `folder`.");
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
        check(open_backend_at(path, &backend));
        std::shared_ptr<Device> device;
        check(Device::open(*backend, index, &device));
        return device;
      },
      py::arg("path"), py::arg("index"), "For tests: a device of any shared object with a backend's table.");
}

}  // namespace hetkv
