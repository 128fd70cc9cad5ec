// The LSTM's gradient.

#include <algorithm>
#include <type_traits>

#include "ffi.h"
#include "lstm.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

// The gates whose gradients, for some steps, stay in cache while the inputs' columns pass by.
constexpr Index kGates = 48;

// The rows h_{t-1}; zero where an episode begins.
template <typename T>
void copy_states(const Shape& shape, Index t, Index first, Index last, const T* start,
                 const T* hidden, const bool* done, T* rows, Index stride) {
  for (Index r = first; r < last; ++r, rows += stride) {
    const Index at = r * shape.time + t;
    const T* before = t == 0 ? start + r * shape.hidden : hidden + (at - 1) * shape.hidden;
    if (done[at]) {
      std::fill_n(rows, shape.hidden, T(0));
    } else {
      std::copy_n(before, shape.hidden, rows);
    }
  }
}

template <typename T>
struct LstmCotangents {
  const T *outputs, *h, *c;  // `outputs` may lie where the gradient of `x` does
};

// Gradients of the weights, summed over a part of the batch.
template <typename T>
struct LstmSums {
  T *of_x, *of_h, *bias;
};

template <typename T>
struct LstmGradients {
  LstmSums<T> weights;
  T *x, *h, *c;
};

// One step of one sequence.
template <typename T>
struct CellStep {
  Index hidden;
  bool begun;       // an episode begins
  const T* kept;    // gates and cell
  const T* before;  // the cell before
  const T* d_output;
  T* tanh_row;  // memory for the cell's tanh
  T* d_gates;   // a result
  T *dh, *dc;   // of this step, given; `dc` becomes that of the step before
};

// By value, as in Rows.
template <typename T>
void cell_gradient(const CellStep<T> at) {
  constexpr Index lanes = kLanes<T>;
  const Index hidden = at.hidden;
  in_groups<T>(hidden, [=](auto size, Index j, Index left) {
    constexpr int N = size;
    Group<T, N> x;
    load_group<T, N>(at.kept + 4 * hidden + j, left, x);
    tanh<T, N>(x);
    store_group<T, N>(at.tanh_row + j, left, x);
  });
  const auto unit = [=](Index j, auto whole) {
    const Index units = whole ? lanes : hidden - j;
    const Vector<T> i = load(at.kept + j, units), f = load(at.kept + hidden + j, units);
    const Vector<T> g = load(at.kept + 2 * hidden + j, units);
    const Vector<T> o = load(at.kept + 3 * hidden + j, units);
    const Vector<T> tanh_c = load(at.tanh_row + j, units);
    const Vector<T> c_before = at.begun ? Vector<T>{} : load(at.before + j, units);
    const Vector<T> d_h = load(at.dh + j, units) + load(at.d_output + j, units);
    const Vector<T> d_c = load(at.dc + j, units) + d_h * o * (1 - tanh_c * tanh_c);
    const Vector<T> parts[] = {d_c * g * i * (1 - i), d_c * c_before * f * (1 - f),
                               d_c * i * (1 - g * g), d_h * tanh_c * o * (1 - o)};
    for (int gate = 0; gate < 4; ++gate) {
      store(at.d_gates + gate * hidden + j, parts[gate], units);
    }
    store(at.dc + j, at.begun ? Vector<T>{} : d_c * f, units);
  };
  Index j = 0;
  for (; j + lanes <= hidden; j += lanes) unit(j, std::true_type());
  if (j < hidden) unit(j, std::false_type());
}

// The weights' columns, packed: dx = d_gates @ of_x, dh = d_gates @ of_h.
template <typename T>
struct Columns {
  static constexpr Index kWide = kWidest * kLanes<T>;
  Index x_panels, h_panels, gates;
  T* packed;

  Columns(ffi::ThreadPool& pool, const Shape& shape, const LstmArguments<T>& args)
      : x_panels((shape.inputs + kWide - 1) / kWide),
        h_panels((shape.hidden + kWide - 1) / kWide),
        gates(4 * shape.hidden) {
    packed = scratch<T, Slot::kPanels>((x_panels + h_panels) * kWide * gates);
    parallel(pool, x_panels + h_panels, [&](Index p) {
      const bool of_x = p < x_panels;
      const Index size = of_x ? shape.inputs : shape.hidden;
      const Index column = (of_x ? p : p - x_panels) * kWide;
      const T* from = (of_x ? args.of_x : args.of_h) + column;
      pack(from, size, gates, std::min(kWide, size - column), kWide, packed + p * kWide * gates);
    });
  }

  Product<T> of_x(Index p) const { return {1, 0, gates, 1, packed + p * kWide * gates, kWide}; }
  Product<T> of_h(Index p) const { return of_x(x_panels + p); }
};

// The sequences [first, last), from their last step to their first.
template <typename T>
class BackwardBlock {
 public:
  BackwardBlock(const Shape& shape, const Columns<T>& columns, const LstmArguments<T>& args,
                const LstmResults<const T>& made, const LstmCotangents<T>& d_results,
                const LstmGradients<T>& gradients, Index first, Index last)
      : shape_(shape),
        columns_(columns),
        args_(args),
        made_(made),
        d_results_(d_results),
        gradients_(gradients),
        first_(first),
        last_(last),
        rows_(last - first),
        slots_(shape.steps<T>(rows_)),
        stride_(row_stride<T>(shape.joined())),
        d_stride_(row_stride<T>(4 * shape.hidden)) {
    joined_ = scratch<T, Slot::kRows>(slots_ * rows_ * stride_);
    d_gates_ = scratch<T, Slot::kGradients>(slots_ * rows_ * d_stride_);
    tanh_row_ = scratch<T, Slot::kTanh>(shape.hidden);
    of_dx_ = scratch<T*, Slot::kPlaces>(slots_ * rows_);
  }

  // Adds to the sums.
  void run(const LstmSums<T>& sums) const {
    const Index size = rows_ * shape_.hidden, at = first_ * shape_.hidden;
    std::fill_n(joined_, slots_ * rows_ * stride_, T(0));
    std::copy_n(d_results_.h + at, size, gradients_.h + at);
    std::copy_n(d_results_.c + at, size, gradients_.c + at);
    Index slot = 0;
    for (Index t = shape_.time - 1; t >= 0; --t) {
      step(t, slot);
      if (++slot < slots_ && t > 0) continue;
      finish(slot * rows_, sums);
      slot = 0;
    }
  }

 private:
  static constexpr Index kWide = Columns<T>::kWide;

  // What the step before waits for; the rest of the step's numbers are left in a slot.
  void step(Index t, Index slot) const {
    const Index hidden = shape_.hidden, inputs = shape_.inputs, time = shape_.time;
    T* d_now = d_gates_ + slot * rows_ * d_stride_;
    T* row = joined_ + slot * rows_ * stride_;
    copy_inputs(shape_, t, first_, last_, args_.x, row, stride_);
    copy_states(shape_, t, first_, last_, args_.h, made_.outputs, args_.done, row + inputs,
                stride_);
    for (Index r = 0; r < rows_; ++r) {
      const Index sequence = first_ + r, at = sequence * time + t;
      const T* kept = made_.kept + (t * shape_.batch + sequence) * 5 * hidden;
      cell_gradient(CellStep<T>{
          .hidden = hidden,
          .begun = args_.done[at],
          .kept = kept,
          .before = t ? kept - shape_.batch * 5 * hidden + 4 * hidden
                      : args_.c + sequence * hidden,
          .d_output = d_results_.outputs + at * hidden,
          .tanh_row = tanh_row_,
          .d_gates = d_now + r * d_stride_,
          .dh = gradients_.h + sequence * hidden,
          .dc = gradients_.c + sequence * hidden,
      });
      of_dx_[slot * rows_ + r] = gradients_.x + at * inputs;
    }
    for (Index q = 0; q < columns_.h_panels; ++q) {
      multiply<T, kWidest>(columns_.of_h(q), rows_, hidden - q * kWide,
                           Rows<const T>{d_now, d_stride_}, zero_start<T>,
                           Rows<T>{gradients_.h + first_ * hidden + q * kWide, hidden});
    }
    for (Index r = first_; r < last_; ++r) {
      if (args_.done[r * time + t]) std::fill_n(gradients_.h + r * hidden, hidden, T(0));
    }
  }

  // What waited until there were so many rows of some steps.
  void finish(Index rows, const LstmSums<T>& sums) const {
    const Index inputs = shape_.inputs, hidden = shape_.hidden;
    T* const* of_dx = of_dx_;
    for (Index p = 0; p < columns_.x_panels; ++p) {
      multiply<T, kWidest>(columns_.of_x(p), rows, inputs - p * kWide,
                           Rows<const T>{d_gates_, d_stride_}, zero_start<T>,
                           [=](Index m) { return of_dx[m] + p * kWide; });
    }
    add_rows(d_gates_, rows, d_stride_, 4 * hidden, sums.bias);
    add(rows, joined_, inputs, sums.of_x);
    add(rows, joined_ + inputs, hidden, sums.of_h);
  }

  // sum (4 * hidden, columns) += d_gates^T @ these columns.
  void add(Index rows, const T* columns_of, Index columns, T* sum) const {
    const Index gates = 4 * shape_.hidden;
    for (Index g = 0; g < gates; g += kGates) {
      const Index some = std::min(kGates, gates - g);
      for (Index n = 0; n < columns; n += kWide) {
        const Product<T> product{1, 0, rows, d_stride_, columns_of + n, stride_};
        const Rows<T> to{sum + g * columns + n, columns};
        multiply<T, kWidest>(product, some, columns - n, Rows<const T>{d_gates_ + g, 1}, to, to);
      }
    }
  }

  const Shape& shape_;
  const Columns<T>& columns_;
  const LstmArguments<T>& args_;
  const LstmResults<const T>& made_;
  const LstmCotangents<T>& d_results_;
  const LstmGradients<T>& gradients_;
  Index first_, last_, rows_, slots_, stride_, d_stride_;
  // For the steps in the slots: rows [x_t, h_{t-1}], the gates' gradients, where those of x go.
  T *joined_, *d_gates_, *tanh_row_, **of_dx_;
};

template <typename T>
void lstm_backward(ffi::ThreadPool& pool, const Shape& shape, const LstmArguments<T>& args,
                   const LstmResults<const T>& made, const LstmCotangents<T>& d_results,
                   const LstmGradients<T>& gradients) {
  const Columns<T> columns(pool, shape, args);
  const Index gates = 4 * shape.hidden;
  const Index size_x = gates * shape.inputs, size_h = gates * shape.hidden;
  const Index size = size_x + size_h + gates;
  // One sum per part; the first lies where the result goes.
  T* others = scratch<T, Slot::kSums>((shape.parts - 1) * size);
  const auto sums_of = [&](Index part) {
    if (part == 0) return gradients.weights;
    T* own = others + (part - 1) * size;
    return LstmSums<T>{own, own + size_x, own + size_x + size_h};
  };
  parallel(pool, shape.parts, [&](Index part) {
    const LstmSums<T> sums = sums_of(part);
    std::fill_n(sums.of_x, size_x, T(0));
    std::fill_n(sums.of_h, size_h, T(0));
    std::fill_n(sums.bias, gates, T(0));
    const Index each = shape.blocks / shape.parts;
    for (Index i = part * each; i < (part + 1) * each; ++i) {
      BackwardBlock<T>(shape, columns, args, made, d_results, gradients, shape.begin(i),
                       shape.begin(i + 1))
          .run(sums);
    }
  });
  parallel(pool, shape.parts, [&](Index piece) {
    const auto add = [&](const T* other, Index count, T* sum) {
      const Index end = share(count, 1, piece + 1, shape.parts);
      for (Index i = share(count, 1, piece, shape.parts); i < end; ++i) sum[i] += other[i];
    };
    for (Index part = 1; part < shape.parts; ++part) {
      const LstmSums<T> other = sums_of(part);
      add(other.of_x, size_x, gradients.weights.of_x);
      add(other.of_h, size_h, gradients.weights.of_h);
      add(other.bias, gates, gradients.weights.bias);
    }
  });
}

ffi::Error LstmBackward(ffi::ThreadPool pool, In of_x, In of_h, In x, In h, In c, In done,
                        In outputs, In kept, In d_outputs, In dh_last, In dc_last, Out d_of_x,
                        Out d_of_h, Out d_bias, Out dx, Out dh, Out dc) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const LstmArguments<T> args{
        .of_x = in<T>(of_x),
        .of_h = in<T>(of_h),
        .bias = nullptr,
        .x = in<T>(x),
        .h = in<T>(h),
        .c = in<T>(c),
        .done = in<bool>(done),
    };
    const LstmResults<const T> made{
        .outputs = in<T>(outputs),
        .h = nullptr,
        .c = nullptr,
        .kept = in<T>(kept),
    };
    const LstmCotangents<T> d_results{
        .outputs = in<T>(d_outputs),
        .h = in<T>(dh_last),
        .c = in<T>(dc_last),
    };
    const LstmGradients<T> gradients{
        .weights = {out<T>(d_of_x), out<T>(d_of_h), out<T>(d_bias)},
        .x = out<T>(dx),
        .h = out<T>(dh),
        .c = out<T>(dc),
    };
    lstm_backward<T>(pool, Shape(x, h, pool), args, made, d_results, gradients);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_backward, LstmBackward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG RET RET RET RET RET
                              RET);
