// Bounded reading and writing of the structs of wire/layout.h. A reader never moves past its end; a rejected read
// changes nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace hetkv::wire {

class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t size) : at_(data), left_(size) {}

  std::size_t left() const { return left_; }

  template <class T>
  [[nodiscard]] bool take(T* value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::uint8_t* from = take(sizeof(T));
    if (from == nullptr) return false;
    std::memcpy(value, from, sizeof(T));
    return true;
  }

  // The next `bytes` bytes, or null where fewer are left.
  [[nodiscard]] const std::uint8_t* take(std::size_t bytes) {
    if (bytes > left_) return nullptr;
    const std::uint8_t* from = at_;
    at_ += bytes;
    left_ -= bytes;
    return from;
  }

 private:
  const std::uint8_t* at_;
  std::size_t left_;
};

// Appends to a vector that the caller owns.
class Writer {
 public:
  explicit Writer(std::vector<std::uint8_t>* out) : out_(out) {}

  template <class T>
  void put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && std::has_unique_object_representations_v<T>);
    put(&value, sizeof(T));
  }

  void put(const void* data, std::size_t bytes) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    out_->insert(out_->end(), from, from + bytes);
  }

  void pad() { out_->resize((out_->size() + 7) / 8 * 8); }

 private:
  std::vector<std::uint8_t>* out_;
};

}  // namespace hetkv::wire
