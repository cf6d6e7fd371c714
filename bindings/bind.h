// Each file of this folder binds one part of csrc/ and is called once by module.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "status.h"

namespace py = pybind11;

namespace hetkv {

// Raises the exception of hetkv/errors.py that belongs to the code.
void check(const Status& status);

void bind_engine(py::module_& m);
void bind_outcome(py::module_& m);
void bind_device(py::module_& m);
void bind_backend(py::module_& m);

}  // namespace hetkv

void bind_wire(py::module_& m);
void bind_remap(py::module_& m);
