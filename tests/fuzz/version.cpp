// What csrc/control asks of the rest of the C library.
#include "hetkv.h"

const char* hetkv_version(void) {
  return "fuzz";
}
