// Each file of this folder binds one part of csrc/ and is called once by module.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backend/backend.h"
#include "status.h"

namespace py = pybind11;

namespace hetkv {

namespace engine {
enum class EventKind : std::uint8_t;
enum class Path : std::uint8_t;
enum class SpanKind : std::uint8_t;
}  // namespace engine

// Codes by the names that Python uses; null where Python has None.
const char* name_of(engine::EventKind kind);
const char* name_of(engine::SpanKind kind);
const char* name_of(engine::Path path);
const char* name_of(HetkvMemoryKind kind);
const char* name_of(HetkvCapability capability);
py::list names_of(std::uint64_t capabilities);

// What a driver says of a device, and of the memory at an address.
py::dict device_facts(const HetkvDeviceInfo& info);
py::dict pointer_facts(const HetkvPointerInfo& info);

// Raises the exception of hetkv/errors.py that belongs to the code.
void check(const Status& status);

void bind_codes(py::module_& m);
void bind_engine(py::module_& m);
void bind_outcome(py::module_& m);
void bind_device(py::module_& m);
void bind_backend(py::module_& m);
void bind_codec(py::module_& m);
void bind_frame(py::module_& m);

}  // namespace hetkv

void bind_wire(py::module_& m);
void bind_remap(py::module_& m);
