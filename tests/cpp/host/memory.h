// Functions of the table about memory. That of a device is shared memory without a name, which ends with its process.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "host/options.h"

namespace hetkv::host {

// Everything that is allocated, registered or opened, by address.
struct Block {
  std::int32_t kind = kHetkvMemoryDevice;
  int device = 0;
  std::size_t bytes = 0;
  std::string file;  // where other processes open it; empty: host memory
  int descriptor = -1;
};
inline std::mutex blocks_mutex;
inline std::map<std::uint64_t, Block> blocks;
inline std::size_t used = 0;
inline std::size_t used_before = 0;  // when the options were set

template <typename T>
std::uint64_t number(T* pointer) {
  return reinterpret_cast<std::uint64_t>(pointer);
}

inline std::map<std::uint64_t, Block>::iterator find_block(std::uint64_t address) {
  auto at = blocks.upper_bound(address);
  if (at == blocks.begin()) return blocks.end();
  --at;
  return address < at->first + at->second.bytes ? at : blocks.end();
}

inline void* map_shared(int descriptor, std::size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  return data == MAP_FAILED ? nullptr : data;
}

inline std::int32_t memory_info(std::int32_t, std::uint64_t* free_bytes, std::uint64_t* total_bytes) {
  *total_bytes = 1ull << 30;
  *free_bytes = *total_bytes - used;
  return kHetkvOk;
}

// Memory that the backend did not allocate is taken for a tensor of device 0, as these are in host memory here.
inline std::int32_t pointer_info(const void* pointer, HetkvPointerInfo* info) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = find_block(number(pointer));
  *info = {};
  info->device_pointer = number(pointer);
  if (at == blocks.end()) {
    info->kind = kHetkvMemoryDevice;
    info->ipc = 1;
    return kHetkvOk;
  }
  info->kind = at->second.kind;
  info->device = at->second.device;
  info->base = at->first;
  info->bytes = at->second.bytes;
  info->ipc = at->second.file.empty() ? 0 : 1;
  return kHetkvOk;
}

inline std::int32_t device_alloc(std::int32_t device, std::size_t bytes, void** pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const long most = option("memory");
  if (used + bytes > used_before + (most >= 0 ? static_cast<std::size_t>(most) : std::size_t{1} << 30)) {
    return fail(kHetkvOutOfMemory, "out of memory");
  }
  Block block;
  block.device = device;
  block.bytes = bytes;
  block.descriptor = memfd_create("hetkv-test", MFD_CLOEXEC);
  const bool sized = block.descriptor >= 0 && ftruncate(block.descriptor, static_cast<off_t>(bytes)) == 0;
  *pointer = sized ? map_shared(block.descriptor, bytes) : nullptr;
  if (*pointer == nullptr) {
    if (block.descriptor >= 0) close(block.descriptor);
    return fail(kHetkvOutOfMemory, "no shared memory");
  }
  block.file = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(block.descriptor);
  used += bytes;
  blocks[number(*pointer)] = block;
  return kHetkvOk;
}

inline std::int32_t device_free(std::int32_t, void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = blocks.find(number(pointer));
  if (at == blocks.end()) return fail(kHetkvInvalid, "not allocated");
  munmap(pointer, at->second.bytes);
  close(at->second.descriptor);
  used -= at->second.bytes;
  blocks.erase(at);
  return kHetkvOk;
}

inline std::int32_t host_alloc(std::size_t bytes, void** pointer) {
  *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks[number(*pointer)] = {kHetkvMemoryPinned, -1, bytes, "", -1};
  return kHetkvOk;
}

inline std::int32_t host_free(void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  blocks.erase(number(pointer));
  std::free(pointer);
  return kHetkvOk;
}

inline std::int32_t host_register(std::int32_t, void* pointer, std::size_t bytes, void** device_pointer) {
  if (has("no-register")) return fail(kHetkvFailed, "cannot pin that");
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  if (blocks.count(number(pointer)) != 0) return fail(kHetkvInvalid, "pinned already");
  blocks[number(pointer)] = {kHetkvMemoryPinned, -1, bytes, "", -1};
  *device_pointer = pointer;
  return kHetkvOk;
}

inline std::int32_t host_unregister(void* pointer) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  return blocks.erase(number(pointer)) == 1 ? kHetkvOk : fail(kHetkvInvalid, "not pinned");
}

inline std::int32_t ipc_export(const void* pointer, HetkvIpcHandle* handle) {
  const std::lock_guard<std::mutex> lock(blocks_mutex);
  const auto at = find_block(number(pointer));
  if (has("no-ipc") || at == blocks.end() || at->second.file.empty()) return fail(kHetkvUnsupported, "no handle");
  *handle = {};
  std::strncpy(reinterpret_cast<char*>(handle->bytes), at->second.file.c_str(), sizeof handle->bytes - 1);
  handle->offset = number(pointer) - at->first;
  handle->length = at->second.bytes;
  return kHetkvOk;
}

inline std::int32_t ipc_open(std::int32_t, const HetkvIpcHandle* handle, void** pointer) {
  if (has("no-peer")) return fail(kHetkvUnsupported, "no peer access");
  const int descriptor = open(reinterpret_cast<const char*>(handle->bytes), O_RDWR | O_CLOEXEC);
  void* data = descriptor >= 0 ? map_shared(descriptor, handle->length) : nullptr;
  if (descriptor >= 0) close(descriptor);
  if (data == nullptr) return fail(kHetkvInvalid, "no such memory");
  *pointer = static_cast<std::uint8_t*>(data) + handle->offset;
  return kHetkvOk;
}

inline std::int32_t ipc_close(std::int32_t, const HetkvIpcHandle* handle, void* pointer) {
  munmap(static_cast<std::uint8_t*>(pointer) - handle->offset, handle->length);
  return kHetkvOk;
}

}  // namespace hetkv::host
