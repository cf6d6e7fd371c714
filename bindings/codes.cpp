// The codes of csrc/ as Python sees them: by name. Each switch covers its enumeration, so that a code without a name
// does not compile.
#include "bind.h"
#include "engine/events.h"
#include "engine/windows.h"
#include "map.h"

namespace hetkv {

using namespace engine;

const char* name_of(EventKind kind) {
  switch (kind) {
    case EventKind::kLayer:
      return "layer";
    case EventKind::kComplete:
      return "complete";
    case EventKind::kPacked:
      return "packed";
    case EventKind::kFailed:
      return "failed";
    case EventKind::kLinkLost:
      return "link_lost";
    case EventKind::kLinkDrained:
      return "link_drained";
  }
  return nullptr;
}

const char* name_of(SpanKind kind) {
  switch (kind) {
    case SpanKind::kPack:
      return "pack";
    case SpanKind::kWire:
      return "wire";
    case SpanKind::kUnpack:
      return "unpack";
  }
  return nullptr;
}

const char* name_of(Path path) {
  switch (path) {
    case Path::kNone:
      return nullptr;
    case Path::kRma:
      return "rma";
    case Path::kShm:
      return "shm";
    case Path::kDevice:
      return "device";
    case Path::kStream:
      return "stream";
  }
  return nullptr;
}

const char* name_of(HetkvMemoryKind kind) {
  switch (kind) {
    case kHetkvMemoryHost:
      return "host";
    case kHetkvMemoryPinned:
      return "pinned";
    case kHetkvMemoryDevice:
      return "device";
    case kHetkvMemoryManaged:
      return "managed";
  }
  return nullptr;
}

const char* name_of(HetkvCapability capability) {
  switch (capability) {
    case kHetkvCapIpc:
      return "ipc";
    case kHetkvCapHostRegister:
      return "host-register";
    case kHetkvCapHostSamePointer:
      return "host-same-pointer";
    case kHetkvCapRdma:
      return "rdma";
    case kHetkvCapRdmaOrdered:
      return "rdma-ordered";
    case kHetkvCapRdmaFlush:
      return "rdma-flush";
    case kHetkvCapStreamDevice:
      return "stream-device";
    case kHetkvCapRelaxedCapture:
      return "relaxed-capture";
    case kHetkvCapHardwareConversion:
      return "hardware-conversion";
    case kHetkvCapHostAtomicStores:
      return "host-atomic-stores";
    case kHetkvCapStreamWaitValue:
      return "stream-wait-value";
  }
  return nullptr;
}

py::list names_of(std::uint64_t capabilities) {
  py::list names;
  for (std::uint64_t bit = 1; bit != 0; bit <<= 1) {
    if ((capabilities & bit) == 0) continue;
    const char* name = name_of(static_cast<HetkvCapability>(bit));
    if (name != nullptr) names.append(name);  // else of a newer backend
  }
  return names;
}

namespace {

// The exception of hetkv/errors.py.
const char* name_of(Code code) {
  switch (code) {
    case Code::kOk:
      return nullptr;
    case Code::kInvalid:
      return "InputError";
    case Code::kMalformed:
      return "MalformedError";
    case Code::kUnsupported:
      return "UnsupportedError";
    case Code::kBadMac:
      return "AuthenticationError";
    case Code::kChecksum:
      return "ChecksumError";
    case Code::kProtocol:
      return "ProtocolError";
    case Code::kPeerLost:
      return "PeerLostError";
    case Code::kLeaseExpired:
      return "LeaseExpiredError";
    case Code::kAborted:
      return "AbortedError";
    case Code::kTransport:
      return "TransportError";
    case Code::kClosed:
      return "ClosedError";
    case Code::kContent:
      return "ContentError";
    case Code::kDevice:
      return "DeviceError";
    case Code::kPoolChecksum:
      return "PoolChecksumError";
  }
  return nullptr;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3FN:
      return "float8_e4m3fn";
    case DType::kFloat8E4M3FNUZ:
      return "float8_e4m3fnuz";
    case DType::kFloat8E5M2:
      return "float8_e5m2";
    case DType::kFloat8E5M2FNUZ:
      return "float8_e5m2fnuz";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
  }
  return nullptr;
}

template <typename Enum>
py::dict codes() {
  py::dict out;
  for (int code = 0; code < 256; ++code) {
    const char* name = name_of(static_cast<Enum>(code));
    if (name != nullptr) out[name] = code;
  }
  return out;
}

}  // namespace

void bind_codes(py::module_& m) {
  m.def("status_codes", &codes<Code>, "For tests: the codes of csrc/status.h by the exception of hetkv/errors.py.");
  m.def("dtype_codes", &codes<DType>, "For tests: the codes of csrc/map.h by the name of hetkv/kv/dtypes.py.");
}

}  // namespace hetkv
