// hetkv._core: conversions between Python and C++ and the exception map, nothing else.
#include "bind.h"

namespace hetkv {

void check(const Status& status) {
  if (status.ok()) return;
  py::gil_scoped_acquire acquire;
  const py::object make = py::module_::import("hetkv.errors").attr("from_code");
  const py::object error = make(static_cast<int>(status.code), status.detail);
  PyErr_SetObject(py::type::of(error).ptr(), error.ptr());
  throw py::error_already_set();
}

}  // namespace hetkv

PYBIND11_MODULE(_core, m) {
  m.doc() = "hetkv's data plane: remap, wire format, transport. Its Python face is the hetkv package.";
  bind_remap(m);
  bind_wire(m);
  hetkv::bind_codes(m);
  hetkv::bind_device(m);
  hetkv::bind_outcome(m);
  hetkv::bind_engine(m);
  hetkv::bind_backend(m);
  hetkv::bind_codec(m);
  hetkv::bind_frame(m);
}
