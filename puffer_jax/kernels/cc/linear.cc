// Linear layers and their gradient.

#include <algorithm>
#include <type_traits>

#include "ffi.h"
#include "heads.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

// For the rows of x and N columns of d: dx = d @ weights, or dx += that, and d_weights += d^T @ x.
// Weights are (N, stride), rows of d `outputs` apart.
template <typename T, int N, int rows>
void few_gradients(const T* x, Index inputs, const T* d, Index outputs, const T* weights,
                   Index stride, bool add, T* dx, T* d_weights) {
  const auto some = [&](Index j, auto whole) {
    const Index count = whole ? kLanes<T> : inputs - j;
    Vector<T> loaded[rows], back[rows] = {};
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) {
      loaded[m] = load(x + m * inputs + j, count);
      if (add) back[m] = load(dx + m * inputs + j, count);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector<T> weight = load(weights + n * stride + j);
      Vector<T> sum = load(d_weights + n * stride + j);
#pragma GCC unroll 4
      for (int m = 0; m < rows; ++m) {
        sum += loaded[m] * d[m * outputs + n];
        back[m] += weight * d[m * outputs + n];
      }
      store(d_weights + n * stride + j, sum);
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) store(dx + m * inputs + j, back[m], count);
  };
  Index j = 0;
  for (; j + kLanes<T> <= inputs; j += kLanes<T>) some(j, std::true_type());
  if (j < inputs) some(j, std::false_type());
}

// The gradient of x (batch, inputs) @ weights (inputs, outputs) + bias.
template <typename T>
struct LinearArguments {
  Index batch, inputs, outputs;
  const T *x, *weights, *d_result;
};

template <typename T>
struct LinearGradients {
  T *x, *weights, *bias;
};

template <typename T>
void linear_gradient(ffi::ThreadPool& pool, const LinearArguments<T>& args,
                     const LinearGradients<T>& gradients) {
  const Index batch = args.batch, inputs = args.inputs, outputs = args.outputs;
  const T *x = args.x, *d = args.d_result;
  T* dx = gradients.x;
  const Index most = batch * inputs > kWorthwhile ? std::max<Index>(1, batch / 32) : 1;
  const Index parts = std::clamp<Index>(pool.num_threads(), 1, most);
  const Index stride = (inputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* across = scratch<T, Slot::kPanels>(outputs * stride);
  pack_transposed(args.weights, outputs, outputs, inputs, stride, across);
  const Index size = (stride + 1) * outputs;
  T* sums = scratch<T, Slot::kSums>(parts * size);
  parallel(pool, parts, [&](Index part) {
    T* sum = sums + part * size;
    std::fill_n(sum, size, T(0));
    constexpr Index kRows = 4;
    const Index first = share(batch, kRows, part, parts);
    const Index last = share(batch, kRows, part + 1, parts);
    add_rows(d + first * outputs, last - first, outputs, outputs, sum + outputs * stride);
    for (Index i = first; i < last;) {
      const Index rows = last - i < kRows ? 1 : kRows;
      for (Index n = 0; n < outputs; n += kFewOutputs) {
        with_few(std::min(kFewOutputs, outputs - n), [&](auto count) {
          const auto add = rows == 1 ? few_gradients<T, count, 1> : few_gradients<T, count, kRows>;
          add(x + i * inputs, inputs, d + i * outputs + n, outputs, across + n * stride, stride,
              n > 0, dx + i * inputs, sum + n * stride);
        });
      }
      i += rows;
    }
  });
  const auto total = [&](Index at) {
    T result = 0;
    for (Index part = 0; part < parts; ++part) result += sums[part * size + at];
    return result;
  };
  for (Index n = 0; n < outputs; ++n) {
    for (Index k = 0; k < inputs; ++k) {
      gradients.weights[k * outputs + n] = total(n * stride + k);
    }
    gradients.bias[n] = total(outputs * stride + n);
  }
}

ffi::Error Linear(ffi::ThreadPool pool, In x, ffi::RemainingArgs layers,
                  ffi::RemainingRets results) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index batch = x.dimensions()[0], inputs = x.dimensions()[1];
    const Heads<T> heads(inputs, layers, results);
    const Index blocks = (batch + kBlock - 1) / kBlock;
    const bool large = batch * inputs * heads.outputs() / 8 > kWorthwhile;
    parallel(pool, blocks, [&](Index i) {
      const Index first = share(batch, 2, i, blocks);
      const Index rows = share(batch, 2, i + 1, blocks) - first;
      heads(first, rows, in<T>(x) + first * inputs, inputs);
    }, large);
  });
}

ffi::Error LinearGradient(ffi::ThreadPool pool, In x, In weights, In d_result, Out dx,
                          Out d_weights, Out d_bias) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const LinearArguments<T> args{
        .batch = x.dimensions()[0],
        .inputs = x.dimensions()[1],
        .outputs = d_result.dimensions()[1],
        .x = in<T>(x),
        .weights = in<T>(weights),
        .d_result = in<T>(d_result),
    };
    const LinearGradients<T> gradients{
        .x = out<T>(dx),
        .weights = out<T>(d_weights),
        .bias = out<T>(d_bias),
    };
    linear_gradient(pool, args, gradients);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_linear, Linear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG.RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_linear_gradient, LinearGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG RET RET RET);
