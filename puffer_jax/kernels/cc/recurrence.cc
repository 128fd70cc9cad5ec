// Linear recurrences along rows.

#include <algorithm>

#include "ffi.h"
#include "threads.h"
#include "vectors.h"

namespace {

// y[t] = a[t] + b[t] * y[t + 1] along the rows, from the last step to the first.
template <typename T>
void recur(ffi::ThreadPool& pool, Index rows, Index time, const T* a, const T* b, T* y) {
  constexpr Index kRows = 8;  // side by side: each waits for itself only
  const Index blocks = (rows + kRows - 1) / kRows, tasks = std::min(blocks, Index(64));
  parallel(pool, tasks, [&](Index task) {
    for (Index i = blocks * task / tasks; i < blocks * (task + 1) / tasks; ++i) {
      const Index first = i * kRows, count = std::min(kRows, rows - first);
      T last[kRows] = {};
      for (Index t = time - 1; t >= 0; --t) {
        for (Index r = 0; r < count; ++r) {
          const Index at = (first + r) * time + t;
          y[at] = last[r] = a[at] + b[at] * last[r];
        }
      }
    }
  });
}

ffi::Error Recur(ffi::ThreadPool pool, In a, In b, Out y) {
  return with_type(a.element_type(), [&](auto zero) {
    using T = decltype(zero);
    recur<T>(pool, a.dimensions()[0], a.dimensions()[1], in<T>(a), in<T>(b), out<T>(y));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_recur, Recur,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
