// Linear layers that read the same vectors, computed as one.

#pragma once

#include <algorithm>
#include <utility>

#include "ffi.h"
#include "memory.h"
#include "product.h"
#include "vectors.h"

namespace {

// So few outputs would leave most lanes of a panel empty, but their sums fit into registers.
constexpr Index kFewOutputs = 8;

// body(count) with a constant for `count`, of at most kFewOutputs.
template <typename Body>
void with_few(Index count, const Body& body) {
  [&]<int... n>(std::integer_sequence<int, n...>) {
    ((count == n + 1 ? body(std::integral_constant<int, n + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, kFewOutputs>());
}

// to[n] = bias[n] + x[0:inputs] . weights[n], for n < N; weights `stride` apart.
template <typename T, int N>
INLINE void dots(const T* x, Index inputs, const T* weights, Index stride, const T* bias, T* to) {
  Vector<T> sums[N] = {};
  for (Index j = 0; j < inputs; j += kLanes<T>) {
    const Vector<T> part = load(x + j, inputs - j);
    EACH sums[i] += part * load(weights + i * stride + j);
  }
  EACH to[i] = bias[i] + total<T>(sums[i]);
}

// Linear layers that read the same vectors, computed as one: each has weights (inputs, outputs), a
// bias, and a result (batch, outputs).
template <typename T>
class Heads {
 public:
  Heads(Index inputs, const ffi::RemainingArgs& layers, const ffi::RemainingRets& results)
      : inputs_(inputs), count_(layers.size() / 2) {
    for (Index i = 0; i < count_; ++i) outputs_ += layers.get<In>(2 * i + 1)->element_count();
    T* joined = scratch<T, Slot::kJoined>((inputs + 1) * outputs_);
    heads_ = scratch<Head, Slot::kHeads>(count_);
    for (Index i = 0, column = 0; i < count_; column += heads_[i++].outputs) {
      const In weights = *layers.get<In>(2 * i), bias = *layers.get<In>(2 * i + 1);
      Out result = *results.get<In>(i);
      heads_[i] = {Index(bias.element_count()), out<T>(result)};
      for (Index k = 0; k <= inputs; ++k) {
        const T* from = k < inputs ? in<T>(weights) + k * heads_[i].outputs : in<T>(bias);
        std::copy_n(from, heads_[i].outputs, joined + k * outputs_ + column);
      }
    }
    bias_ = joined + inputs * outputs_;
    stride_ = (inputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    if (outputs_ > kFewOutputs) {
      const Index lanes = lanes_of<T>(outputs_);
      weights_ = panels_of<T, Slot::kMorePanels>(joined, inputs, outputs_, false, lanes);
    } else {
      T* few = scratch<T, Slot::kMorePanels>(kFewOutputs * stride_);
      pack_transposed(joined, outputs_, outputs_, inputs, stride_, few);
      weights_ = few;
    }
  }

  Index outputs() const { return outputs_; }

  // The rows [first, first + rows) of the results, from these vectors.
  void operator()(Index first, Index rows, const T* vectors, Index stride) const {
    T* all = count_ == 1 ? heads_[0].result + first * outputs_
                         : scratch<T, Slot::kHeadResults>(rows * outputs_);
    if (outputs_ > kFewOutputs) {
      multiply_packed<T>(
          weights_, inputs_, outputs_, rows, [&](Index m) { return vectors + m * stride; },
          [&](Index) { return bias_; }, [&](Index m) { return all + m * outputs_; });
    } else {
      with_few(outputs_, [&](auto count) {
        for (Index m = 0; m < rows; ++m) {
          dots<T, count>(vectors + m * stride, inputs_, weights_, stride_, bias_,
                         all + m * outputs_);
        }
      });
    }
    for (Index i = 0, column = 0; i < count_ && count_ > 1; column += heads_[i++].outputs) {
      const Head head = heads_[i];
      for (Index m = 0; m < rows; ++m) {
        std::copy_n(all + m * outputs_ + column, head.outputs,
                    head.result + (first + m) * head.outputs);
      }
    }
  }

 private:
  struct Head {
    Index outputs;
    T* result;
  };
  Index inputs_, count_, outputs_ = 0, stride_;
  Head* heads_;
  const T *weights_, *bias_;
};

}  // namespace
