// Perceptrons: a hidden layer with GELU, and linear layers that read it.

#include <algorithm>
#include <memory>

#include "ffi.h"
#include "heads.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

// x (batch, inputs) -> gelu(x @ w1 + b1) (batch, hidden), and from that, if `outputs`, (batch,
// outputs): @ w2 + b2. Hidden vectors stay in cache, and are recomputed for the gradient.
struct Layers {
  Index batch, inputs, hidden, outputs;
  Index parts, blocks;

  Layers(const In& x, Index hidden, Index outputs, ffi::ThreadPool& pool)
      : batch(x.dimensions()[0]), inputs(x.dimensions()[1]), hidden(hidden), outputs(outputs) {
    // GELU costs about as much as 48 more inputs.
    const Index cycles = batch * hidden * (inputs + outputs + 48) / 32;
    const Index most = cycles > kWorthwhile ? std::max<Index>(1, batch / 32) : 1;
    parts = std::clamp<Index>(pool.num_threads(), 1, most);
    blocks = parts * std::max<Index>(1, (batch + parts * kBlock - 1) / (parts * kBlock));
  }

  Index begin(Index block) const { return share(batch, 2, block, blocks); }
};

template <typename T>
void gelu(T* x, Index count) {
  in_groups<T>(count, [&](auto size, Index at, Index left) {
    constexpr int N = size;
    Group<T, N> z, density, integral;
    load_group<T, N>(x + at, left, z);
    normal<T, N>(z, density, integral);
    EACH z[i] *= integral[i];
    store_group<T, N>(x + at, left, z);
  });
}

template <typename T>
void perceptron(ffi::ThreadPool& pool, const Layers& shape, const T* x, const T* w1, const T* b1,
                const Heads<T>* heads, T* result) {
  const Index inputs = shape.inputs, hidden = shape.hidden;
  const T* weights = panels_of<T, Slot::kPanels>(w1, inputs, hidden, false, lanes_of<T>(hidden));
  parallel(pool, shape.blocks, [&](Index i) {
    const Index first = shape.begin(i), rows = shape.begin(i + 1) - first;
    const Index stride = heads ? row_stride<T>(hidden) : hidden;
    T* activations = heads ? scratch<T, Slot::kResults>(rows * stride) : result + first * hidden;
    multiply_packed<T>(
        weights, inputs, hidden, rows, [&](Index m) { return x + (first + m) * inputs; },
        [&](Index) { return b1; }, [&](Index m) { return activations + m * stride; });
    for (Index m = 0; m < rows; ++m) gelu<T>(activations + m * stride, hidden);
    if (heads) (*heads)(first, rows, activations, stride);
  });
}

template <typename T>
struct PerceptronArguments {
  const T *x, *w1, *b1, *w2, *d_result;
};

template <typename T>
struct PerceptronGradients {
  T *w1, *b1, *w2, *b2;
};

// z[0:count], the input of GELU, becomes its output; d_z is the gradient of z, `d` of the output.
template <typename T>
void gelu_gradient(T* z_row, const T* d, Index count, T* d_z) {
  in_groups<T>(count, [&](auto size, Index j, Index left) {
    constexpr int N = size;
    Group<T, N> z, density, slope;
    load_group<T, N>(z_row + j, left, z);
    normal<T, N>(z, density, slope);
    EACH density[i] = z[i] * (density[i] * T(0.39894228040143267794)) + slope[i];
    EACH z[i] *= slope[i];
    store_group<T, N>(z_row + j, left, z);
    load_group<T, N>(d + j, left, z);
    EACH density[i] *= z[i];
    store_group<T, N>(d_z + j, left, density);
  });
}

// sum (inputs, columns) += from^T @ d, for the rows of both, `step` and `stride` apart.
template <typename T>
void add_weights(Index rows, const T* from, Index step, Index inputs, const T* d, Index stride,
                 Index columns, T* sum) {
  with_width(panel_width<T>(columns), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    for (Index p = 0; p < columns; p += lanes) {
      const Product<T> product{1, 0, rows, step, d + p, stride};
      const auto to = [&](Index m) { return sum + m * columns + p; };
      multiply<T, width>(product, inputs, columns - p, [&](Index m) { return from + m; }, to, to);
    }
  });
}

template <typename T>
void perceptron_gradient(ffi::ThreadPool& pool, const Layers& shape,
                         const PerceptronArguments<T>& args,
                         const PerceptronGradients<T>& gradients) {
  const Index inputs = shape.inputs, hidden = shape.hidden, outputs = shape.outputs;
  const Index lanes = lanes_of<T>(hidden);
  const T* weights = panels_of<T, Slot::kPanels>(args.w1, inputs, hidden, false, lanes);
  const T* back = panels_of<T, Slot::kMorePanels>(args.w2, outputs, hidden, true, lanes);
  const Index sizes[] = {inputs * hidden, hidden, hidden * outputs, outputs};
  const Index size = sizes[0] + sizes[1] + sizes[2] + sizes[3];
  std::unique_ptr<T[]> sums(new T[shape.parts * size]);
  const Index each = shape.blocks / shape.parts;
  parallel(pool, shape.parts, [&](Index part) {
    T* sum = sums.get() + part * size;
    std::fill_n(sum, size, T(0));
    const Index stride = row_stride<T>(hidden);
    const Index d_stride = (outputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (Index i = part * each; i < (part + 1) * each; ++i) {
      const Index first = shape.begin(i), rows = shape.begin(i + 1) - first;
      const T* x = args.x + first * inputs;
      const T* d_result = args.d_result + first * (outputs ? outputs : hidden);
      T* activations = scratch<T, Slot::kResults>(rows * stride);
      T* d_hidden = scratch<T, Slot::kGradients>(rows * stride);
      std::fill_n(d_hidden, rows * stride, T(0));
      multiply_packed<T>(
          weights, inputs, hidden, rows, [&](Index m) { return x + m * inputs; },
          [&](Index) { return args.b1; }, [&](Index m) { return activations + m * stride; });
      if (outputs) {
        multiply_packed<T>(
            back, outputs, hidden, rows, [&](Index m) { return d_result + m * outputs; },
            zero_start<T>, [&](Index m) { return d_hidden + m * stride; });
      }
      for (Index m = 0; m < rows; ++m) {
        T* d_row = d_hidden + m * stride;
        gelu_gradient(activations + m * stride, outputs ? d_row : d_result + m * hidden, hidden,
                      d_row);
      }
      add_rows(d_hidden, rows, stride, hidden, sum + sizes[0]);
      add_weights(rows, x, inputs, inputs, d_hidden, stride, hidden, sum);
      if (outputs == 0) continue;
      add_rows(d_result, rows, outputs, outputs, sum + size - sizes[3]);
      T* d_rows = scratch<T, Slot::kResultGradients>(rows * d_stride);
      pack(d_result, outputs, rows, outputs, d_stride, d_rows);
      add_weights(rows, activations, stride, hidden, d_rows, d_stride, outputs,
                  sum + sizes[0] + sizes[1]);
    }
  });
  T* const results[] = {gradients.w1, gradients.b1, gradients.w2, gradients.b2};
  for (Index part = 0; part < shape.parts; ++part) {
    const T* sum = sums.get() + part * size;
    for (int k = 0; k < 4; sum += sizes[k], ++k) {
      for (Index i = 0; i < sizes[k]; ++i) results[k][i] = (part ? results[k][i] : 0) + sum[i];
    }
  }
}

ffi::Error Perceptron(ffi::ThreadPool pool, In x, In w1, In b1, ffi::RemainingArgs layers,
                      ffi::RemainingRets results) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index hidden = b1.element_count();
    if (layers.size() == 0) {
      Out result = *results.get<In>(0);
      const Layers shape(x, hidden, 0, pool);
      perceptron<T>(pool, shape, in<T>(x), in<T>(w1), in<T>(b1), nullptr, out<T>(result));
    } else {
      const Heads<T> heads(hidden, layers, results);
      const Layers shape(x, hidden, heads.outputs(), pool);
      perceptron<T>(pool, shape, in<T>(x), in<T>(w1), in<T>(b1), &heads, nullptr);
    }
  });
}

ffi::Error PerceptronGradient(ffi::ThreadPool pool, In x, In w1, In b1, In w2, In d_result,
                              Out d_w1, Out d_b1, Out d_w2, Out d_b2) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Layers shape(x, w1.dimensions()[1], w2.dimensions()[1], pool);
    const PerceptronArguments<T> args{
        .x = in<T>(x),
        .w1 = in<T>(w1),
        .b1 = in<T>(b1),
        .w2 = in<T>(w2),
        .d_result = in<T>(d_result),
    };
    const PerceptronGradients<T> gradients{
        .w1 = out<T>(d_w1),
        .b1 = out<T>(d_b1),
        .w2 = out<T>(d_w2),
        .b2 = out<T>(d_b2),
    };
    perceptron_gradient(pool, shape, args, gradients);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_perceptron, Perceptron,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG.RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_perceptron_gradient, PerceptronGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG RET RET RET RET);
