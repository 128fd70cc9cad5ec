// Adam.

#include <algorithm>
#include <cmath>

#include "ffi.h"
#include "threads.h"
#include "vectors.h"

namespace {

struct AdamNumbers {
  enum : Index { scale, decay1, new1, decay2, new2, rate, inverse_root, eps, skip, count };
};

// One pass over what XLA goes through three times, and copies.
template <typename T>
void adam(ffi::ThreadPool& pool, Index size, const T* numbers, const T* gradient, T* params,
          T* first, T* second) {
  using Is = AdamNumbers;
  if (numbers[Is::skip] != 0) return;
  constexpr Index lanes = kLanes<T>;
  const Index parts = size * 4 > kWorthwhile ? std::max<Index>(1, pool.num_threads()) : 1;
  parallel(pool, parts, [&](Index part) {
    const Index end = share(size, lanes, part + 1, parts);
    for (Index i = share(size, lanes, part, parts); i < end; i += lanes) {
      const Index count = std::min(end - i, lanes);
      const Vector<T> g = load(gradient + i, count) * numbers[Is::scale];
      const Vector<T> m = load(first + i, count) * numbers[Is::decay1] + g * numbers[Is::new1];
      const Vector<T> v = load(second + i, count) * numbers[Is::decay2] + g * g * numbers[Is::new2];
      Vector<T> deviation;
      for (Index k = 0; k < lanes; ++k) deviation[k] = std::sqrt(v[k]);
      const Vector<T> step =
          m * numbers[Is::rate] / (deviation * numbers[Is::inverse_root] + numbers[Is::eps]);
      store(params + i, load(params + i, count) + step, count);
      store(first + i, m, count);
      store(second + i, v, count);
    }
  });
}

// The results are the parameters and the moments themselves.
ffi::Error Adam(ffi::ThreadPool pool, In numbers, In gradient, In, In, In, Out params, Out first,
                Out second) {
  // Each with its numbers: `vmap` puts several into one call.
  const Index several = numbers.element_count() / AdamNumbers::count;
  const Index size = gradient.element_count() / several;
  return with_type(gradient.element_type(), [&](auto zero) {
    using T = decltype(zero);
    for (Index i = 0; i < several; ++i) {
      const Index at = i * size;
      adam<T>(pool, size, in<T>(numbers) + i * AdamNumbers::count, in<T>(gradient) + at,
              out<T>(params) + at, out<T>(first) + at, out<T>(second) + at);
    }
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_adam, Adam,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG RET RET RET);
