// Convolutions.

#include <algorithm>

#include "ffi.h"
#include "images.h"
#include "memory.h"
#include "product.h"
#include "threads.h"

namespace {

template <typename T>
struct Filters {
  const T *kernel, *bias;
};

template <typename T>
struct Result {
  T* data;
  bool channels_first;
};

template <typename T, typename X>
void convolve(ffi::ThreadPool& pool, const Windows& w, const X& x, const Filters<T>& filters,
              const Result<T>& to) {
  const T* bias = filters.bias;
  const bool across = to.channels_first;
  const Index outputs = w.out.channels, numbers = w.numbers();
  with_width(panel_width<T>(outputs), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    const Index panels = (outputs + lanes - 1) / lanes;
    T* packed = scratch<T, Slot::kPanels>(panels * numbers * lanes);
    for (Index p = 0; p < panels; ++p) {
      const Index columns = std::min(lanes, outputs - p * lanes);
      pack(filters.kernel + p * lanes, outputs, numbers, columns, lanes,
           packed + p * numbers * lanes);
    }
    const Index row = w.sides.columns * w.x.channels, pixels = w.out.height * w.out.width;
    Index* starts = scratch<Index, Slot::kPlaces>(pixels);
    for (Index i = 0; i < pixels; ++i) {
      starts[i] = i / w.out.width * w.stride.rows * row +
                  i % w.out.width * w.stride.columns * w.x.channels;
    }
    parallel(pool, w.x.batch, [&](Index n) {
      const T* image = bordered<T>(w, x, n);
      T* result = to.data + n * w.out.size();
      T* pixels_first = across ? scratch<T, Slot::kResults>(w.out.size()) : result;
      for (Index p = 0; p < panels; ++p) {
        T* first = pixels_first + p * lanes;
        multiply<T, width>(
            {w.size.rows, row, w.size.columns * w.x.channels, 1, packed + p * numbers * lanes,
             lanes},
            pixels, outputs - p * lanes, [&](Index i) { return image + starts[i]; },
            [&](Index) { return bias + p * lanes; }, [&](Index i) { return first + i * outputs; });
      }
      if (across) transpose(pixels_first, outputs, pixels, outputs, result, pixels);
    });
  });
}

ffi::Error Convolve(ffi::ThreadPool pool, In x, In kernel, In bias, Out result, bool channels_first,
                    bool rectify, Index stride_rows, Index stride_columns, Index pad_rows,
                    Index pad_columns, bool out_channels_first) {
  const Windows windows(Images(x.dimensions(), channels_first), kernel.dimensions(),
                        Images(result->dimensions(), out_channels_first),
                        {stride_rows, stride_columns}, {pad_rows, pad_columns});
  return with_type(kernel.element_type(), [&](auto zero) {
    using T = decltype(zero);
    with_images<T>(x, channels_first, rectify, [&](const auto& images) {
      const Filters<T> filters{.kernel = in<T>(kernel), .bias = in<T>(bias)};
      const Result<T> to{.data = out<T>(result), .channels_first = out_channels_first};
      convolve(pool, windows, images, filters, to);
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve, Convolve,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG RET WINDOWS
                              .Attr<bool>("out_channels_first"));
