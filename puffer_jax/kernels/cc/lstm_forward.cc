// The LSTM over sequences.

#include <algorithm>
#include <type_traits>

#include "ffi.h"
#include "lstm.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

template <typename T>
void lstm_forward(ffi::ThreadPool& pool, const Shape& shape, const T* of_x, const T* of_h,
                  const T* bias, const T* x, const T* h, const T* c, const bool* done, T* outputs,
                  T* h_last, T* c_last, T* kept) {
  const Index hidden = shape.hidden, joined = shape.joined(), time = shape.time;
  const Index inputs = shape.inputs;
  constexpr Index lanes = kLanes<T>;
  const Index panels = (hidden + lanes - 1) / lanes;
  T* packed = scratch<T, Slot::kPanels>(panels * 4 * lanes * (joined + 1));
  T* biases = packed + panels * 4 * lanes * joined;
  // The four gates of as many units as a vector has lanes, side by side in as few panels as can be.
  constexpr Index piece = kWidest * lanes;
  parallel(pool, panels, [&](Index p) {
    const Index units = std::min(lanes, hidden - p * lanes);
    for (Index gate = 0; gate < 4; ++gate) {
      const Index row = gate * hidden + p * lanes;
      T* own = biases + (p * 4 + gate) * lanes;
      std::copy_n(bias + row, units, own);
      std::fill(own + units, own + lanes, T(0));
      T* to = packed + (p * 4 + gate / kWidest * kWidest) * lanes * joined + gate % kWidest * lanes;
      transpose(of_x + row * inputs, inputs, units, inputs, to, piece);
      transpose(of_h + row * hidden, hidden, units, hidden, to + inputs * piece, piece);
      if (units == lanes) continue;
      for (Index k = 0; k < joined; ++k, to += piece) std::fill(to + units, to + lanes, T(0));
    }
  });
  // to(m)[0:4 * lanes] = start(m) + from(m) @ these units' weights of the inputs [begin, end).
  const auto gates_of = [packed, joined](Index p, Index begin, Index end, Index count,
                                         Rows<const T> from, Rows<const T> start, Rows<T> to) {
    const T* panel = packed + p * 4 * lanes * joined + begin * piece;
    for (Index at = 0; at < 4 * lanes; at += piece, panel += piece * joined) {
      multiply<T, kWidest>({1, 0, end - begin, 1, panel, piece}, count, piece, from, start, to);
      start.first += piece;
      to.first += piece;
    }
  };
  const auto block = [=](Index first, Index last) {
    const Index rows = last - first, steps = shape.steps<T>(rows);
    const Index slots = std::max<Index>(2, steps);
    const Index stride = row_stride<T>(joined), wide = 4 * lanes;
    // Rows whose gates are made before the first of them is needed, and how many if there are more.
    constexpr int tile_rows = kTileRows[kWidest];
    constexpr int most_rows = kSplits<kWidest> ? kTileRows[kWidest / 2] : 2 * tile_rows;
    constexpr int many_rows = kSplits<kWidest> ? tile_rows : most_rows;
    // Rows [x_t, h_{t-1}], and of some steps what x_t gives to the gates: (panels, rows, wide).
    T* slot = scratch<T, Slot::kRows>(slots * rows * stride);
    T* given = scratch<T, Slot::kResults>(steps > 1 ? panels * steps * rows * wide : 0);
    T* cells = c_last + first * hidden;
    std::copy_n(c + first * hidden, rows * hidden, cells);
    const auto rows_of = [=](Index t) { return slot + t % slots * rows * stride; };
    const auto begun = [=](Index m, Index t) { return done[(first + m) * time + t]; };
    for (Index m = 0; m < rows; ++m) {
      std::copy_n(h + (first + m) * hidden, hidden, slot + m * stride + inputs);
    }
    const Index own = steps > 1 ? inputs : 0;  // the rows' part left to each step begins here
    for (Index t = 0; t < time; ++t) {
      const Index step = t % steps;
      if (step == 0) {
        const Index ahead = std::min(steps, time - t);
        for (Index i = 0; i < ahead; ++i) {
          copy_inputs(shape, t + i, first, last, x, rows_of(t + i), stride);
        }
        for (Index p = 0; p < panels && steps > 1; ++p) {
          gates_of(p, 0, inputs, ahead * rows, {slot, stride}, {biases + p * wide, 0},
                   {given + p * steps * rows * wide, wide});
        }
      }
      T* now = rows_of(t);
      T* next = rows_of(t + 1) + inputs;
      for (Index m = 0; m < rows; ++m) {
        if (begun(m, t)) std::fill_n(now + m * stride + inputs, hidden, T(0));
      }
      for (Index p = 0; p < panels; ++p) {
        const Index units = std::min(lanes, hidden - p * lanes);
        const T* start = own ? given + (p * steps + step) * rows * wide : biases + p * wide;
        alignas(kBytes) T sums[most_rows * 4 * lanes];
        for (Index m = 0, valid; m < rows; m += valid) {
          valid = rows - m <= most_rows ? rows - m : even(rows - m, many_rows);
          gates_of(p, own, joined, valid, {now + m * stride + own, stride},
                   own ? Rows<const T>{start + m * wide, wide} : Rows<const T>{start, 0},
                   {sums, wide});
          T* cell = cells + m * hidden + p * lanes;
          T* keep = nullptr;
          if (kept) keep = kept + (t * shape.batch + first + m) * 5 * hidden + p * lanes;
          T* last = next + m * stride + p * lanes;
          const auto update = [=, &sums](auto side_by_side, Index i) {
            constexpr int N = side_by_side;
            Group<T, 4 * N> gates;
            load_group<T, 4 * N>(sums + i * wide, N * wide, gates);
            squash<T, 4 * N>(gates);
#pragma GCC unroll 2
            for (int k = 0; k < N; ++k) {
              const Index r = i + k;
              T* of_cell = cell + r * hidden;
              const Vector<T> before = begun(m + r, t) ? Vector<T>{} : load(of_cell, units);
              const Vector<T> after = gates[4 * k + 1] * before + gates[4 * k] * gates[4 * k + 2];
              store(of_cell, after, units);
              store(last + r * stride, gates[4 * k + 3], units);
              if (keep == nullptr) continue;
              T* to = keep + r * 5 * hidden;
#pragma GCC unroll 4
              for (int g = 0; g < 4; ++g) store(to + g * hidden, gates[4 * k + g], units);
              store(to + 4 * hidden, after, units);
            }
          };
          Index i = 0;
          // Two at once need more registers than others have.
          for (; kBytes == 64 && i + 1 < valid; i += 2) update(std::integral_constant<int, 2>(), i);
          for (; i < valid; ++i) update(std::integral_constant<int, 1>(), i);
        }
      }
      // A cell's tanh waits for its gates: later, beside those of many others.
      for (Index m = 0; m < rows; ++m) {
        const T* cell = cells + m * hidden;
        T* state = next + m * stride;
        T* output = outputs + ((first + m) * time + t) * hidden;
        in_groups<T>(hidden, [=](auto size, Index j, Index left) {
          constexpr int N = size;
          Group<T, N> x, last;
          load_group<T, N>(cell + j, left, x);
          load_group<T, N>(state + j, left, last);
          tanh<T, N>(x);
          EACH x[i] *= last[i];
          store_group<T, N>(state + j, left, x);
          store_group<T, N>(output + j, left, x);
        });
      }
    }
    const T* after = rows_of(time) + inputs;
    for (Index m = 0; m < rows; ++m) {
      T* to = h_last + (first + m) * hidden;
      if (h_last != outputs) std::copy_n(after + m * stride, hidden, to);
    }
  };
  parallel(pool, shape.blocks, [&](Index i) { block(shape.begin(i), shape.begin(i + 1)); });
}

ffi::Error LstmForward(ffi::ThreadPool pool, In of_x, In of_h, In bias, In x, In h, In c, In done,
                       Out outputs, Out h_last, Out c_last, Out kept) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    T* keep = kept->element_count() ? out<T>(kept) : nullptr;
    lstm_forward<T>(pool, Shape(x, h, pool), in<T>(of_x), in<T>(of_h), in<T>(bias), in<T>(x),
                    in<T>(h), in<T>(c), in<bool>(done), out<T>(outputs), out<T>(h_last),
                    out<T>(c_last), keep);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_forward, LstmForward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG RET RET RET RET);
