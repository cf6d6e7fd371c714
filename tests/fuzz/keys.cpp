// Fuzzer of the keys of slots, which a grant carries: in host memory and in device memory.
#include <cstdlib>
#include <vector>

#include "engine/window_key.h"
#include "transport/memory_key.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::vector<std::uint8_t> bytes(data, data + size);
  hetkv::transport::MemoryKey host;
  if (hetkv::transport::decode(bytes, &host).ok() && hetkv::transport::encode(host) != bytes) std::abort();
  hetkv::engine::DeviceWindowKey device;
  const bool ok = hetkv::engine::decode_key(bytes, &device).ok();
  if (ok && !hetkv::engine::is_device_key(bytes)) std::abort();
  if (ok && hetkv::engine::encode_key(device) != bytes) std::abort();
  return 0;
}
