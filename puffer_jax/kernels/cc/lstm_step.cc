// One step of the LSTM, for acting.

#include <algorithm>

#include "ffi.h"
#include "lstm.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

// One step for acting. The batch is small, so the weights stay where they are: they are the rows,
// and panels of the transposed inputs pass them by. From this many states on, packing them pays.
constexpr Index kManyStates = 1024;

template <typename T, int width>
void lstm_step(ffi::ThreadPool& pool, Index batch, Index inputs, Index hidden,
               const LstmArguments<T>& args, const LstmResults<T>& results) {
  constexpr Index lanes = kLanes<T>, wide = width * lanes, kUnits = 16;
  const Index panels = (batch + wide - 1) / wide, groups = (hidden + kUnits - 1) / kUnits;
  const Index size = (inputs + 2 * hidden) * wide;
  const bool large = batch * (inputs + hidden) * hidden * 4 / (2 * lanes) > kWorthwhile;
  T* packed = scratch<T, Slot::kPanels>(panels * size);
  parallel(pool, panels, [&](Index p) {
    const Index first = p * wide, count = std::min(wide, batch - first);
    T* panel = packed + p * size;
    pack_transposed(args.x + first * inputs, inputs, inputs, count, wide, panel);
    pack_transposed(args.h + first * hidden, hidden, hidden, count, wide, panel + inputs * wide);
    T* cells = panel + (inputs + hidden) * wide;
    pack_transposed(args.c + first * hidden, hidden, hidden, count, wide, cells);
  }, large);
  parallel(pool, panels * groups, [&](Index task) {
    const Index first = task / groups * wide, count = std::min(wide, batch - first);
    const Index unit = task % groups * kUnits, units = std::min(kUnits, hidden - unit);
    const T* panel = packed + task / groups * size;
    alignas(kBytes) T gates[4 * kUnits][wide];
    // Row m is of a unit's gate; where there are too few units, the last one's again.
    const auto row = [&](Index m) {
      return m / kUnits * hidden + unit + std::min(m % kUnits, units - 1);
    };
    const auto to = [&](Index m) { return gates[m]; };
    multiply<T, width>(
        {1, 0, inputs, 1, panel, wide}, 4 * kUnits, wide,
        [&](Index m) { return args.of_x + row(m) * inputs; }, zero_start<T>, to);
    multiply<T, width>(
        {1, 0, hidden, 1, panel + inputs * wide, wide}, 4 * kUnits, wide,
        [&](Index m) { return args.of_h + row(m) * hidden; }, to, to);
    // Cells take the place of the first gate, then their tanh times the last that of the second.
    for (Index m = 0; m < units; ++m) {
      const T* own = args.bias + unit + m;
      const T* cells = panel + (inputs + hidden + unit + m) * wide;
      // Two at once need more registers than others have.
      constexpr int side_by_side = width % 2 || kBytes < 64 ? 1 : 2;
      for (Index v = 0; v < wide; v += side_by_side * lanes) {
        constexpr int N = 4 * side_by_side;
        Group<T, N> all;
        EACH all[i] = load(gates[i % 4 * kUnits + m] + v + i / 4 * lanes) + own[i % 4 * hidden];
        squash<T, N>(all);
#pragma GCC unroll 2
        for (int k = 0; k < side_by_side; ++k) {
          const Index at = v + k * lanes;
          store(gates[m] + at, all[4 * k + 1] * load(cells + at) + all[4 * k] * all[4 * k + 2]);
          store(gates[3 * kUnits + m] + at, all[4 * k + 3]);
        }
      }
    }
    in_groups<T>(units * wide, [&](auto size, Index j, Index left) {
      constexpr int N = size;
      Group<T, N> squashed, last;
      load_group<T, N>(gates[0] + j, left, squashed);
      load_group<T, N>(gates[3 * kUnits] + j, left, last);
      tanh<T, N>(squashed);
      EACH squashed[i] *= last[i];
      store_group<T, N>(gates[kUnits] + j, left, squashed);
    });
    const Index at = first * hidden + unit;
    transpose(gates[0], wide, units, count, results.c + at, hidden);
    transpose(gates[kUnits], wide, units, count, results.h + at, hidden);
  }, large);
}

ffi::Error LstmStep(ffi::ThreadPool pool, In of_x, In of_h, In bias_x, In bias_h, In x, In h, In c,
                    Out h_next, Out c_next) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index batch = x.dimensions()[0], inputs = x.dimensions()[1], hidden = h.dimensions()[1];
    T* bias = scratch<T, Slot::kBias>(4 * hidden);
    for (Index i = 0; i < 4 * hidden; ++i) bias[i] = in<T>(bias_x)[i] + in<T>(bias_h)[i];
    LstmArguments<T> args{
        .of_x = in<T>(of_x),
        .of_h = in<T>(of_h),
        .bias = bias,
        .x = in<T>(x),
        .h = in<T>(h),
        .c = in<T>(c),
        .done = nullptr,
    };
    T* next = out<T>(h_next);
    const LstmResults<T> results{.outputs = next, .h = next, .c = out<T>(c_next), .kept = nullptr};
    if (batch >= kManyStates) {
      bool* never = scratch<bool, Slot::kNever>(batch);
      std::fill_n(never, batch, false);
      args.done = never;
      lstm_forward<T>(pool, Shape(x, h, pool), args, results);
      return;
    }
    with_width(panel_width<T>(batch), [&](auto width) {
      lstm_step<T, width>(pool, batch, inputs, hidden, args, results);
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_step, LstmStep,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG RET RET);
