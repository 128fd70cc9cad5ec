// Max pooling and its gradient.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "ffi.h"
#include "images.h"
#include "threads.h"
#include "vectors.h"

namespace {

// The largest number of each window of 3x3, 2 apart, borders of 1; `taken`, if any, tells which of
// the nine it was, the first of equal ones. NaN is larger than any number.
template <typename T>
void max_pool(ffi::ThreadPool& pool, const Images& x, const Images& out, const T* data, T* result,
              std::int8_t* taken) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Bits Integers __attribute__((vector_size(kBytes)));
  typedef std::int8_t Small __attribute__((vector_size(kLanes<T>), aligned(1), may_alias));
  const Index channels = x.channels;
  parallel(pool, x.batch, [&](Index n) {
    for (Index i = 0; i < out.height; ++i) {
      // Rows and columns of the window from its last to its first.
      const Index top = i ? 0 : 1, bottom = std::min<Index>(2, x.height - 2 * i);
      for (Index j = 0; j < out.width; ++j) {
        const Index left = j ? 0 : 1, right = std::min<Index>(2, x.width - 2 * j);
        const T* corner = data + n * x.size() + ((2 * i - 1) * x.width + 2 * j - 1) * channels;
        const Index at = n * out.size() + (i * out.width + j) * channels;
        for (Index c = 0; c < channels; c += kLanes<T>) {
          const Index count = std::min(channels - c, kLanes<T>);
          Vector<T> best = Vector<T>{} - std::numeric_limits<T>::infinity();
          Integers which = {};
          for (Index row = bottom; row >= top; --row) {
            for (Index column = right; column >= left; --column) {
              const T* from = corner + (row * x.width + column) * channels + c;
              const Vector<T> value = load(from, count);
              const auto more = (value >= best) | (value != value);
              best = more ? value : best;
              which = more ? Integers{} + Bits(3 * row + column) : which;
            }
          }
          store(result + at + c, best, count);
          if (taken == nullptr) continue;
          if (count == kLanes<T>) {
            *reinterpret_cast<Small*>(taken + at + c) = __builtin_convertvector(which, Small);
          } else {
            for (Index k = 0; k < count; ++k) taken[at + c + k] = which[k];
          }
        }
      }
    }
  });
}

template <typename T>
void max_pool_gradient(ffi::ThreadPool& pool, const Images& x, const Images& out,
                       const std::int8_t* taken, const T* d_out, T* dx) {
  const Index channels = x.channels;
  parallel(pool, x.batch, [&](Index n) {
    T* image = dx + n * x.size();
    std::fill_n(image, x.size(), T(0));
    for (Index i = 0; i < out.height; ++i) {
      for (Index j = 0; j < out.width; ++j) {
        T* corner = image + ((2 * i - 1) * x.width + 2 * j - 1) * channels;
        const Index at = n * out.size() + (i * out.width + j) * channels;
        for (Index c = 0; c < channels; ++c) {
          const int tap = taken[at + c];
          corner[(tap / 3 * x.width + tap % 3) * channels + c] += d_out[at + c];
        }
      }
    }
  });
}

ffi::Error MaxPool(ffi::ThreadPool pool, In x, Out result, Out taken) {
  const Images images(x.dimensions()), pooled(result->dimensions());
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    std::int8_t* where = taken->element_count() ? out<std::int8_t>(taken) : nullptr;
    max_pool<T>(pool, images, pooled, in<T>(x), out<T>(result), where);
  });
}

ffi::Error MaxPoolGradient(ffi::ThreadPool pool, In taken, In d_out, Out dx) {
  const Images images(dx->dimensions()), pooled(d_out.dimensions());
  return with_type(d_out.element_type(), [&](auto zero) {
    using T = decltype(zero);
    max_pool_gradient<T>(pool, images, pooled, in<std::int8_t>(taken), in<T>(d_out), out<T>(dx));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_max_pool, MaxPool,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_max_pool_gradient, MaxPoolGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
