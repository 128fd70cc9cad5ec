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

// Gates whose gradients of some steps stay in cache while the inputs' columns pass by.
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
void lstm_backward(ffi::ThreadPool& pool, const Shape& shape, const T* of_x, const T* of_h,
                   const T* x, const T* h, const T* c, const bool* done, const T* outputs,
                   const T* kept, const T* d_outputs, const T* dh_last, const T* dc_last,
                   T* d_of_x, T* d_of_h, T* d_bias, T* dx, T* dh, T* dc) {
  const Index hidden = shape.hidden, joined = shape.joined(), time = shape.time;
  const Index gates = 4 * hidden, inputs = shape.inputs;
  constexpr Index lanes = kLanes<T>, wide = kWidest * lanes;
  // dx = d_gates @ of_x, dh = d_gates @ of_h: panels of their columns.
  const Index x_panels = (inputs + wide - 1) / wide, h_panels = (hidden + wide - 1) / wide;
  T* packed = scratch<T, Slot::kPanels>((x_panels + h_panels) * wide * gates);
  parallel(pool, x_panels + h_panels, [&](Index p) {
    T* to = packed + p * wide * gates;
    if (p < x_panels) {
      pack(of_x + p * wide, inputs, gates, std::min(wide, inputs - p * wide), wide, to);
    } else {
      const Index column = (p - x_panels) * wide;
      pack(of_h + column, hidden, gates, std::min(wide, hidden - column), wide, to);
    }
  });
  // Gradients of the weights, one sum a part; the first where the result goes.
  struct Sums {
    T *of_x, *of_h, *bias;
  };
  const Index size_x = gates * inputs, size_h = gates * hidden, size = size_x + size_h + gates;
  T* others = scratch<T, Slot::kSums>((shape.parts - 1) * size);
  const auto sums_of = [&](Index part) {
    if (part == 0) return Sums{d_of_x, d_of_h, d_bias};
    T* own = others + (part - 1) * size;
    return Sums{own, own + size_x, own + size_x + size_h};
  };

  const auto block = [=](Index first, Index last, const Sums& sums) {
    const Index rows = last - first;
    const Index stride = row_stride<T>(joined), d_stride = row_stride<T>(gates);
    const Index slots = shape.steps<T>(rows);
    T* inputs_rows = scratch<T, Slot::kRows>(slots * rows * stride);
    T* d_rows = scratch<T, Slot::kGradients>(slots * rows * d_stride);
    T* tanh_row = scratch<T, Slot::kTanh>(hidden);
    T** of_dx = scratch<T*, Slot::kPlaces>(slots * rows);
    std::fill_n(inputs_rows, slots * rows * stride, T(0));
    std::copy_n(dh_last + first * hidden, rows * hidden, dh + first * hidden);
    std::copy_n(dc_last + first * hidden, rows * hidden, dc + first * hidden);
    Index slot = 0;
    for (Index t = time - 1; t >= 0; --t) {
      T* d_now = d_rows + slot * rows * d_stride;
      T* row = inputs_rows + slot * rows * stride;
      copy_inputs(shape, t, first, last, x, row, stride);
      copy_states(shape, t, first, last, h, outputs, done, row + inputs, stride);
      for (Index r = 0; r < rows; ++r) {
        const Index at = (first + r) * time + t;
        const T* keep = kept + (t * shape.batch + first + r) * 5 * hidden;
        const T* before =
            t ? keep - shape.batch * 5 * hidden + 4 * hidden : c + (first + r) * hidden;
        T* d_row = d_now + r * d_stride;
        T* dh_row = dh + (first + r) * hidden;
        T* dc_row = dc + (first + r) * hidden;
        const T* d_output = d_outputs + at * hidden;
        const bool begun = done[at];
        in_groups<T>(hidden, [=](auto size, Index j, Index left) {
          constexpr int N = size;
          Group<T, N> x;
          load_group<T, N>(keep + 4 * hidden + j, left, x);
          tanh<T, N>(x);
          store_group<T, N>(tanh_row + j, left, x);
        });
        const auto unit = [=](Index j, auto whole) {
          const Index units = whole ? lanes : hidden - j;
          const Vector<T> i = load(keep + j, units), f = load(keep + hidden + j, units);
          const Vector<T> g = load(keep + 2 * hidden + j, units);
          const Vector<T> o = load(keep + 3 * hidden + j, units);
          const Vector<T> tanh_c = load(tanh_row + j, units);
          const Vector<T> c_before = begun ? Vector<T>{} : load(before + j, units);
          const Vector<T> d_h = load(dh_row + j, units) + load(d_output + j, units);
          const Vector<T> d_c = load(dc_row + j, units) + d_h * o * (1 - tanh_c * tanh_c);
          const Vector<T> parts[] = {d_c * g * i * (1 - i), d_c * c_before * f * (1 - f),
                                     d_c * i * (1 - g * g), d_h * tanh_c * o * (1 - o)};
          for (int gate = 0; gate < 4; ++gate) {
            store(d_row + gate * hidden + j, parts[gate], units);
          }
          store(dc_row + j, begun ? Vector<T>{} : d_c * f, units);
        };
        Index j = 0;
        for (; j + lanes <= hidden; j += lanes) unit(j, std::true_type());
        if (j < hidden) unit(j, std::false_type());
      }
      for (Index q = 0; q < h_panels; ++q) {
        const Product<T> product{1, 0, gates, 1, packed + (x_panels + q) * wide * gates, wide};
        multiply<T, kWidest>(product, rows, hidden - q * wide, Rows<const T>{d_now, d_stride},
                             nothing<T>, Rows<T>{dh + first * hidden + q * wide, hidden});
      }
      for (Index r = first; r < last; ++r) {
        if (done[r * time + t]) std::fill_n(dh + r * hidden, hidden, T(0));
      }
      for (Index r = 0; r < rows; ++r) {
        of_dx[slot * rows + r] = dx + ((first + r) * time + t) * inputs;
      }
      if (++slot < slots && t > 0) continue;
      for (Index p = 0; p < x_panels; ++p) {
        const Product<T> product{1, 0, gates, 1, packed + p * wide * gates, wide};
        multiply<T, kWidest>(product, slot * rows, inputs - p * wide,
                             Rows<const T>{d_rows, d_stride}, nothing<T>,
                             [=](Index m) { return of_dx[m] + p * wide; });
      }
      const auto add = [&](const T* rows_of, Index columns, T* sum) {
        for (Index g = 0; g < gates; g += kGates) {
          const Index some = std::min(kGates, gates - g);
          for (Index n = 0; n < columns; n += wide) {
            const Product<T> product{1, 0, slot * rows, d_stride, rows_of + n, stride};
            const Rows<T> to{sum + g * columns + n, columns};
            multiply<T, kWidest>(product, some, columns - n, Rows<const T>{d_rows + g, 1}, to, to);
          }
        }
      };
      add_rows(d_rows, slot * rows, d_stride, gates, sums.bias);
      add(inputs_rows, inputs, sums.of_x);
      add(inputs_rows + inputs, hidden, sums.of_h);
      slot = 0;
    }
  };
  parallel(pool, shape.parts, [&](Index part) {
    const Sums sums = sums_of(part);
    std::fill_n(sums.of_x, size_x, T(0));
    std::fill_n(sums.of_h, size_h, T(0));
    std::fill_n(sums.bias, gates, T(0));
    const Index each = shape.blocks / shape.parts;
    for (Index i = part * each; i < (part + 1) * each; ++i) {
      block(shape.begin(i), shape.begin(i + 1), sums);
    }
  });
  parallel(pool, shape.parts, [&](Index piece) {
    const auto add = [&](const T* other, Index count, T* sum) {
      const Index end = share(count, 1, piece + 1, shape.parts);
      for (Index i = share(count, 1, piece, shape.parts); i < end; ++i) sum[i] += other[i];
    };
    for (Index part = 1; part < shape.parts; ++part) {
      const Sums other = sums_of(part);
      add(other.of_x, size_x, d_of_x);
      add(other.of_h, size_h, d_of_h);
      add(other.bias, gates, d_bias);
    }
  });
}

ffi::Error LstmBackward(ffi::ThreadPool pool, In of_x, In of_h, In x, In h, In c, In done,
                        In outputs, In kept, In d_outputs, In dh_last, In dc_last, Out d_of_x,
                        Out d_of_h, Out d_bias, Out dx, Out dh, Out dc) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    lstm_backward<T>(pool, Shape(x, h, pool), in<T>(of_x), in<T>(of_h), in<T>(x), in<T>(h),
                     in<T>(c), in<bool>(done), in<T>(outputs), in<T>(kept), in<T>(d_outputs),
                     in<T>(dh_last), in<T>(dc_last), out<T>(d_of_x), out<T>(d_of_h),
                     out<T>(d_bias), out<T>(dx), out<T>(dh), out<T>(dc));
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_backward, LstmBackward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG RET RET RET RET RET
                              RET);
