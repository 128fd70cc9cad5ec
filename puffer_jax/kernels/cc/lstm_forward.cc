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

// The weights, packed: the four gates of as many units as a vector has lanes, side by side in as
// few panels as possible.
template <typename T>
struct Gates {
  static constexpr Index kWide = 4 * kLanes<T>, kPiece = kWidest * kLanes<T>;
  Index panels, joined;
  T *packed, *biases;

  Gates(ffi::ThreadPool& pool, const Shape& shape, const LstmArguments<T>& args)
      : panels((shape.hidden + kLanes<T> - 1) / kLanes<T>), joined(shape.joined()) {
    packed = scratch<T, Slot::kPanels>(panels * kWide * (joined + 1));
    biases = packed + panels * kWide * joined;
    parallel(pool, panels, [&](Index p) { pack_units(shape, args, p); });
  }

  void pack_units(const Shape& shape, const LstmArguments<T>& args, Index p) {
    constexpr Index lanes = kLanes<T>;
    const Index hidden = shape.hidden, inputs = shape.inputs;
    const Index units = std::min(lanes, hidden - p * lanes);
    for (Index gate = 0; gate < 4; ++gate) {
      const Index row = gate * hidden + p * lanes;
      T* own = biases + (p * 4 + gate) * lanes;
      std::copy_n(args.bias + row, units, own);
      std::fill(own + units, own + lanes, T(0));
      T* to = packed + (p * 4 + gate / kWidest * kWidest) * lanes * joined + gate % kWidest * lanes;
      transpose(args.of_x + row * inputs, inputs, units, inputs, to, kPiece);
      transpose(args.of_h + row * hidden, hidden, units, hidden, to + inputs * kPiece, kPiece);
      if (units == lanes) continue;
      for (Index k = 0; k < joined; ++k, to += kPiece) std::fill(to + units, to + lanes, T(0));
    }
  }

  // to(m)[0:kWide] = start(m) + from(m) @ these units' weights of the inputs [begin, end).
  void operator()(Index p, Index begin, Index end, Index count, Rows<const T> from,
                  Rows<const T> start, Rows<T> to) const {
    const T* panel = packed + p * kWide * joined + begin * kPiece;
    for (Index at = 0; at < kWide; at += kPiece, panel += kPiece * joined) {
      multiply<T, kWidest>({1, 0, end - begin, 1, panel, kPiece}, count, kPiece, from, start, to);
      start.first += kPiece;
      to.first += kPiece;
    }
  }
};

// Some units of some sequences at one step, from where the first of these lies.
template <typename T>
struct Cells {
  Index units, hidden, stride, time;
  const T* gates;     // (sequences, 4, lanes), before they are squashed
  const bool* begun;  // whether an episode begins, `time` apart
  T* cell;            // `hidden` apart
  T* last_gate;       // of the results, `stride` apart
  T* kept;            // (sequences, 5, hidden), if any
};

// For N sequences from number i on: their cells, and the last gate. By value, as in Rows.
template <typename T, int N>
INLINE void update(const Cells<T> at, Index i) {
  Group<T, 4 * N> gates;
  load_group<T, 4 * N>(at.gates + i * 4 * kLanes<T>, N * 4 * kLanes<T>, gates);
  squash<T, 4 * N>(gates);
#pragma GCC unroll 2
  for (int k = 0; k < N; ++k) {
    const Index r = i + k;
    T* cell = at.cell + r * at.hidden;
    const Vector<T> before = at.begun[r * at.time] ? Vector<T>{} : load(cell, at.units);
    const Vector<T> after = gates[4 * k + 1] * before + gates[4 * k] * gates[4 * k + 2];
    store(cell, after, at.units);
    store(at.last_gate + r * at.stride, gates[4 * k + 3], at.units);
    if (at.kept == nullptr) continue;
    T* to = at.kept + r * 5 * at.hidden;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) store(to + g * at.hidden, gates[4 * k + g], at.units);
    store(to + 4 * at.hidden, after, at.units);
  }
}

// state[0:hidden], so far the last gate, and the output: that gate times the cell's tanh.
template <typename T>
INLINE void expose(Index hidden, const T* cell, T* state, T* output) {
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

// The sequences [first, last), step by step.
template <typename T>
class ForwardBlock {
 public:
  ForwardBlock(const Shape& shape, const Gates<T>& gates, const LstmArguments<T>& args,
               const LstmResults<T>& results, Index first, Index last)
      : shape_(shape),
        gates_(gates),
        args_(args),
        results_(results),
        first_(first),
        rows_(last - first),
        steps_(shape.steps<T>(rows_)),
        slots_(std::max<Index>(2, steps_)),
        stride_(row_stride<T>(shape.joined())) {
    joined_ = scratch<T, Slot::kRows>(slots_ * rows_ * stride_);
    ahead_ = scratch<T, Slot::kResults>(steps_ > 1 ? gates.panels * steps_ * rows_ * kWide : 0);
    cells_ = results.c + first * shape.hidden;
  }

  void run() const {
    const Index hidden = shape_.hidden, time = shape_.time;
    std::copy_n(args_.c + first_ * hidden, rows_ * hidden, cells_);
    T* states = rows_of(0) + shape_.inputs;
    for (Index m = 0; m < rows_; ++m) {
      std::copy_n(args_.h + (first_ + m) * hidden, hidden, states + m * stride_);
    }
    for (Index t = 0; t < time; ++t) {
      if (t % steps_ == 0) begin(t);
      step(t);
    }
    const T* after = rows_of(time) + shape_.inputs;
    for (Index m = 0; m < rows_; ++m) {
      T* to = results_.h + (first_ + m) * hidden;
      if (results_.h != results_.outputs) std::copy_n(after + m * stride_, hidden, to);
    }
  }

 private:
  static constexpr Index kWide = Gates<T>::kWide;

  T* rows_of(Index t) const { return joined_ + t % slots_ * rows_ * stride_; }

  // What does not depend on the step before, for the steps from t on.
  void begin(Index t) const {
    const Index count = std::min(steps_, shape_.time - t), last = first_ + rows_;
    for (Index i = 0; i < count; ++i) {
      copy_inputs(shape_, t + i, first_, last, args_.x, rows_of(t + i), stride_);
    }
    for (Index p = 0; p < gates_.panels && steps_ > 1; ++p) {
      gates_(p, 0, shape_.inputs, count * rows_, {joined_, stride_}, {gates_.biases + p * kWide, 0},
             {ahead_ + p * steps_ * rows_ * kWide, kWide});
    }
  }

  void step(Index t) const {
    const Index hidden = shape_.hidden, inputs = shape_.inputs, time = shape_.time;
    const bool* begun = args_.done + first_ * time + t;
    T* now = rows_of(t);
    T* next = rows_of(t + 1) + inputs;
    for (Index m = 0; m < rows_; ++m) {
      if (begun[m * time]) std::fill_n(now + m * stride_ + inputs, hidden, T(0));
    }
    for (Index p = 0; p < gates_.panels; ++p) update_units(t, p, now, next);
    // A cell's tanh waits for its gates: later, beside those of many others.
    for (Index m = 0; m < rows_; ++m) {
      expose<T>(hidden, cells_ + m * hidden, next + m * stride_,
                results_.outputs + ((first_ + m) * time + t) * hidden);
    }
  }

  void update_units(Index t, Index p, const T* now, T* next) const {
    // Rows whose gates are made before the first of them is needed, and how many if there are more.
    constexpr int tile_rows = kTileRows[kWidest];
    constexpr int most_rows = kSplits<kWidest> ? kTileRows[kWidest / 2] : 2 * tile_rows;
    constexpr int many_rows = kSplits<kWidest> ? tile_rows : most_rows;
    const Index hidden = shape_.hidden, time = shape_.time, unit = p * kLanes<T>;
    // Where the part of the rows that is left to each step begins.
    const Index own = steps_ > 1 ? shape_.inputs : 0;
    const T* start = own ? ahead_ + (p * steps_ + t % steps_) * rows_ * kWide
                         : gates_.biases + p * kWide;
    alignas(kBytes) T sums[most_rows * kWide];
    for (Index m = 0, valid; m < rows_; m += valid) {
      valid = rows_ - m <= most_rows ? rows_ - m : even_share(rows_ - m, many_rows);
      gates_(p, own, shape_.joined(), valid, {now + m * stride_ + own, stride_},
             own ? Rows<const T>{start + m * kWide, kWide} : Rows<const T>{start, 0},
             {sums, kWide});
      T* kept = nullptr;
      if (results_.kept) {
        kept = results_.kept + (t * shape_.batch + first_ + m) * 5 * hidden + unit;
      }
      const Cells<T> at{
          .units = std::min(kLanes<T>, hidden - unit),
          .hidden = hidden,
          .stride = stride_,
          .time = time,
          .gates = sums,
          .begun = args_.done + (first_ + m) * time + t,
          .cell = cells_ + m * hidden + unit,
          .last_gate = next + m * stride_ + unit,
          .kept = kept,
      };
      Index i = 0;
      // Two at once need more registers than others have.
      for (; kBytes == 64 && i + 1 < valid; i += 2) update<T, 2>(at, i);
      for (; i < valid; ++i) update<T, 1>(at, i);
    }
  }

  const Shape& shape_;
  const Gates<T>& gates_;
  const LstmArguments<T>& args_;
  const LstmResults<T>& results_;
  // Sequences, and how many steps begin at once.
  Index first_, rows_, steps_, slots_;
  // Rows [x_t, h_{t-1}] of some steps, and what x_t gives to their gates: (panels, rows, kWide).
  Index stride_;
  T *joined_, *ahead_;
  T* cells_;
};

template <typename T>
void lstm_forward(ffi::ThreadPool& pool, const Shape& shape, const LstmArguments<T>& args,
                  const LstmResults<T>& results) {
  const Gates<T> gates(pool, shape, args);
  parallel(pool, shape.blocks, [&](Index i) {
    ForwardBlock<T>(shape, gates, args, results, shape.begin(i), shape.begin(i + 1)).run();
  });
}

ffi::Error LstmForward(ffi::ThreadPool pool, In of_x, In of_h, In bias, In x, In h, In c, In done,
                       Out outputs, Out h_last, Out c_last, Out kept) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const LstmArguments<T> args{
        .of_x = in<T>(of_x),
        .of_h = in<T>(of_h),
        .bias = in<T>(bias),
        .x = in<T>(x),
        .h = in<T>(h),
        .c = in<T>(c),
        .done = in<bool>(done),
    };
    const LstmResults<T> results{
        .outputs = out<T>(outputs),
        .h = out<T>(h_last),
        .c = out<T>(c_last),
        .kept = kept->element_count() ? out<T>(kept) : nullptr,
    };
    lstm_forward<T>(pool, Shape(x, h, pool), args, results);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_forward, LstmForward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG RET RET RET RET);
