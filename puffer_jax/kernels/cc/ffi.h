// What XLA passes to a kernel: buffers and attributes.

#pragma once

#include <exception>
#include <new>

#include "memory.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Parts of a handler's signature.
#define ARG .Arg<In>()
#define RET .Ret<ffi::AnyBuffer>()

namespace {

template <typename T>
const T* in(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* out(ffi::Result<ffi::AnyBuffer>& buffer) {
  prefer_large_pages(buffer->untyped_data(), buffer->size_bytes());
  return static_cast<T*>(buffer->untyped_data());
}

// A library serves one type, which halves the time to compile: most users need no other.
#ifndef NUMBER
#define NUMBER float
#endif

// XLA takes errors, but not exceptions.
template <typename Body>
ffi::Error without_exceptions(const Body& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a CPU kernel");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
  return ffi::Error::Success();
}

template <typename Body>
ffi::Error with_type(ffi::DataType type, const Body& body) {
  constexpr ffi::DataType own = sizeof(NUMBER) == 4 ? ffi::DataType::F32 : ffi::DataType::F64;
  if (type != own) return ffi::Error::InvalidArgument("numbers of another type than expected");
  return without_exceptions([&] { body(NUMBER()); });
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

}  // namespace
