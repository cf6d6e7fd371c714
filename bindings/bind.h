// Each file of this folder binds one part of csrc/ and is called once by module.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

void bind_remap(py::module_& m);
