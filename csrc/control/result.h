// What a call of the C library came to: its status and one line. Statuses are those of include/hetkv.h.
#pragma once

#include <string>
#include <utility>

#include "hetkv.h"
#include "status.h"

namespace hetkv {

struct [[nodiscard]] Result {
  hetkv_status status = HETKV_OK;
  std::string detail;

  bool ok() const { return status == HETKV_OK; }
};

inline Result failure(hetkv_status status, std::string detail) {
  return {status, std::move(detail)};
}

// The engine's codes are the first statuses.
inline Result result_of(const Status& status) {
  return {static_cast<hetkv_status>(status.code), status.detail};
}

}  // namespace hetkv
