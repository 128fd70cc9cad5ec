// Convolutions' gradients: of the images and of the weights.

#include <algorithm>
#include <memory>

#include "ffi.h"
#include "images.h"
#include "memory.h"
#include "product.h"
#include "threads.h"
#include "vectors.h"

namespace {

inline Index taps(Index size, Index stride, Index phase) {
  return phase < size ? (size - phase + stride - 1) / stride : 0;
}

struct Phase {
  Pair at, count;  // where its taps of the windows begin, and how many there are
  // Its pixels (y, x), y + pad = stride * q + at: the first, with its q, and how many there are.
  Pair q, first, pixels;

  Phase(const Windows& w, Index number)
      : at{number / w.stride.columns, number % w.stride.columns},
        count{taps(w.size.rows, w.stride.rows, at.rows),
              taps(w.size.columns, w.stride.columns, at.columns)},
        q{(std::max<Index>(0, w.pad.rows - at.rows) + w.stride.rows - 1) / w.stride.rows,
          (std::max<Index>(0, w.pad.columns - at.columns) + w.stride.columns - 1) /
              w.stride.columns},
        first{q.rows * w.stride.rows + at.rows - w.pad.rows,
              q.columns * w.stride.columns + at.columns - w.pad.columns},
        pixels{(w.x.height - first.rows + w.stride.rows - 1) / w.stride.rows,
               (w.x.width - first.columns + w.stride.columns - 1) / w.stride.columns} {}
};

// The pixels that one number of the windows meets are `stride` apart, so each of the stride's
// phases is a convolution of d_out with every stride-th number of the reversed windows. With images
// `x`, a ReLU came first.
template <typename T>
void convolve_images_gradient(ffi::ThreadPool& pool, const Windows& w, const T* x, const T* kernel,
                              const T* d_out, T* dx) {
  const Index outputs = w.out.channels, channels = w.x.channels;
  const Pair most{taps(w.size.rows, w.stride.rows, 0), taps(w.size.columns, w.stride.columns, 0)};
  const Pair corner{most.rows - 1, most.columns - 1};
  const Pair sides{(w.x.height - 1 + w.pad.rows) / w.stride.rows + most.rows,
                   (w.x.width - 1 + w.pad.columns) / w.stride.columns + most.columns};
  const Index row = sides.columns * outputs;
  with_width(panel_width<T>(channels), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    const Index panels = (channels + lanes - 1) / lanes;
    const Index panel_size = most.rows * most.columns * outputs * lanes;
    const Index phases = w.stride.rows * w.stride.columns;
    T* packed = scratch<T, Slot::kPanels>(phases * panels * panel_size);
    for (Index phase = 0; phase < phases; ++phase) {
      const Phase of(w, phase);
      const Pair at = of.at, count = of.count;
      for (Index p = 0; p < panels; ++p) {
        T* to = packed + (phase * panels + p) * panel_size;
        const Index columns = std::min(lanes, channels - p * lanes);
        for (Index i = count.rows - 1; i >= 0; --i) {
          for (Index j = count.columns - 1; j >= 0; --j, to += outputs * lanes) {
            const Index tap = (at.rows + i * w.stride.rows) * w.size.columns + at.columns +
                              j * w.stride.columns;
            pack_transposed(kernel + (tap * channels + p * lanes) * outputs, outputs, outputs,
                            columns, lanes, to);
          }
        }
      }
    }
    parallel(pool, w.x.batch, [&](Index n) {
      T* image = scratch<T, Slot::kRows>(sides.rows * row);
      frame(d_out + n * w.out.size(), {w.out.height, w.out.width}, outputs, corner, sides, false,
            image);
      for (Index phase = 0; phase < phases; ++phase) {
        const Phase of(w, phase);
        const Pair count = of.count, q = of.q, first = of.first, pixels = of.pixels;
        if (pixels.rows <= 0 || pixels.columns <= 0) continue;
        const T* from = image + (q.rows + corner.rows - count.rows + 1) * row +
                        (q.columns + corner.columns - count.columns + 1) * outputs;
        const Index length = count.columns * outputs;
        for (Index p = 0; p < panels; ++p) {
          const Product<T> product{count.rows, row, length, 1,
                                   packed + (phase * panels + p) * panel_size, lanes};
          T* to = dx + n * w.x.size() + (first.rows * w.x.width + first.columns) * channels +
                  p * lanes;
          multiply<T, width>(
              product, pixels.rows * pixels.columns, channels - p * lanes,
              [&](Index i) {
                return from + i / pixels.columns * row + i % pixels.columns * outputs;
              },
              zero_start<T>,
              [&](Index i) {
                return to + (i / pixels.columns * w.stride.rows * w.x.width +
                             i % pixels.columns * w.stride.columns) *
                                channels;
              });
        }
      }
      const Index begin = n * w.x.size();
      for (Index i = 0; i < w.x.size() && x != nullptr; i += kLanes<T>) {
        const Index left = w.x.size() - i;
        const Vector<T> d = load(dx + begin + i, left);
        store(dx + begin + i, load(x + begin + i, left) > 0 ? d : Vector<T>{}, left);
      }
    });
  });
}

template <typename T, typename X>
void convolve_weights_gradient(ffi::ThreadPool& pool, const Windows& w, const X& x,
                               const T* d_out, T* d_kernel, T* d_bias) {
  const Index outputs = w.out.channels, pixels = w.out.height * w.out.width;
  const Index pixel = w.stride.columns * w.x.channels, row = w.sides.columns * w.x.channels;
  // One row of the windows is one piece of a row of the image.
  const Index length = w.size.columns * w.x.channels, size = w.numbers() * outputs;
  const Index parts = std::clamp<Index>(pool.num_threads(), 1, w.x.batch);
  // Of every part: (rows of the windows, outputs, length), then the bias.
  std::unique_ptr<T[]> sums(new T[parts * (size + outputs)]);
  with_width(panel_width<T>(length), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    parallel(pool, parts, [&](Index part) {
      T* sum = sums.get() + part * (size + outputs);
      std::fill_n(sum, size + outputs, T(0));
      const Index last = share(w.x.batch, 1, part + 1, parts);
      for (Index n = share(w.x.batch, 1, part, parts); n < last; ++n) {
        const T* image = bordered<T>(w, x, n, length % lanes != 0);
        const T* d_image = d_out + n * w.out.size();
        add_rows(d_image, pixels, outputs, outputs, sum + size);
        for (Index i = 0; i < w.size.rows; ++i) {
          for (Index p = 0; p < length; p += lanes) {
            const Product<T> product{w.out.height,
                                     w.out.width * outputs,
                                     w.out.width,
                                     outputs,
                                     image + i * row + p,
                                     pixel,
                                     w.stride.rows * row};
            const auto to = [&](Index m) { return sum + (i * outputs + m) * length + p; };
            multiply<T, width>(
                product, outputs, length - p, [&](Index m) { return d_image + m; }, to, to);
          }
        }
      }
    });
  });
  const auto total = [&](Index at) {
    T result = 0;
    for (Index part = 0; part < parts; ++part) result += sums[part * (size + outputs) + at];
    return result;
  };
  for (Index i = 0; i < w.size.rows; ++i) {
    for (Index m = 0; m < outputs; ++m) {
      for (Index k = 0; k < length; ++k) {
        d_kernel[(i * length + k) * outputs + m] = total((i * outputs + m) * length + k);
      }
    }
  }
  for (Index m = 0; m < outputs; ++m) d_bias[m] = total(size + m);
}

ffi::Error ConvolveImagesGradient(ffi::ThreadPool pool, In x, In kernel, In d_out, Out dx,
                                  bool channels_first, bool rectify, Index stride_rows,
                                  Index stride_columns, Index pad_rows, Index pad_columns) {
  const Windows windows(Images(dx->dimensions(), channels_first), kernel.dimensions(),
                        Images(d_out.dimensions()), {stride_rows, stride_columns},
                        {pad_rows, pad_columns});
  return with_type(kernel.element_type(), [&](auto zero) {
    using T = decltype(zero);
    convolve_images_gradient<T>(pool, windows, rectify ? in<T>(x) : nullptr, in<T>(kernel),
                                in<T>(d_out), out<T>(dx));
  });
}

ffi::Error ConvolveWeightsGradient(ffi::ThreadPool pool, In x, In d_out, Out d_kernel, Out d_bias,
                                   bool channels_first, bool rectify, Index stride_rows,
                                   Index stride_columns, Index pad_rows, Index pad_columns) {
  const Windows windows(Images(x.dimensions(), channels_first), d_kernel->dimensions(),
                        Images(d_out.dimensions()), {stride_rows, stride_columns},
                        {pad_rows, pad_columns});
  return with_type(d_out.element_type(), [&](auto zero) {
    using T = decltype(zero);
    with_images<T>(x, channels_first, rectify, [&](const auto& images) {
      convolve_weights_gradient<T>(pool, windows, images, in<T>(d_out), out<T>(d_kernel),
                                   out<T>(d_bias));
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve_images_gradient, ConvolveImagesGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG RET WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve_weights_gradient, ConvolveWeightsGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET RET WINDOWS);
