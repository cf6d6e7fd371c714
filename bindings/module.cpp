// hetkv._core: conversions between Python and C++ and the exception map, nothing else.
#include "bind.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "hetkv's data plane: remap, wire format, transport. Its Python face is the hetkv package.";
  bind_remap(m);
}
