// The shapes of an LSTM, and the rows it reads.

#pragma once

#include <algorithm>

#include "ffi.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

// x is (batch * time, inputs), h (batch, hidden).
struct Shape {
  Index batch, time, inputs, hidden;
  Index parts, blocks;  // of the batch: parts run side by side, each some blocks long

  Shape(const In& x, const In& h, ffi::ThreadPool& pool)
      : batch(h.dimensions()[0]),
        time(x.dimensions()[0] / batch),
        inputs(x.dimensions()[1]),
        hidden(h.dimensions()[1]) {
    parts = std::clamp<Index>(pool.num_threads(), 1, std::max<Index>(1, batch / 6));
    blocks = parts * std::max<Index>(1, (batch + parts * kBlock - 1) / (parts * kBlock));
  }

  Index joined() const { return inputs + hidden; }
  Index begin(Index block) const { return share(batch, 2, block, blocks); }
  // What does not depend on the step before, small blocks do for several steps at once, so that the
  // weights pass by less often; for more steps if these are too large for a core's cache.
  template <typename T>
  Index steps(Index rows) const {
    const bool large = 4 * hidden * joined() * sizeof(T) > (1 << 20);
    return std::clamp<Index>((large ? 3 : 1) * kBlock / std::max<Index>(1, rows), 1, time);
  }
};

// The rows x_t of the sequences [first, last).
template <typename T>
void copy_inputs(const Shape& shape, Index t, Index first, Index last, const T* x, T* rows,
                 Index stride) {
  for (Index r = first; r < last; ++r, rows += stride) {
    std::copy_n(x + (r * shape.time + t) * shape.inputs, shape.inputs, rows);
  }
}

template <typename T>
struct LstmArguments {
  const T *of_x, *of_h, *bias;  // the weights of the inputs and of the states
  const T *x, *h, *c;
  const bool* done;  // (batch, time): an episode begins, so the state before it does not count
};

template <typename T>
struct LstmResults {
  T* outputs;  // may lie where `x` does
  T *h, *c;    // after the last step; `h` is not written where it is `outputs`
  T* kept;     // (time, batch, 5, hidden), if any: gates i, f, g, o and cell, for the gradient
};

template <typename T>
void lstm_forward(ffi::ThreadPool& pool, const Shape& shape, const LstmArguments<T>& args,
                  const LstmResults<T>& results);

}  // namespace
