// Images, and the windows that slide over them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ffi.h"
#include "memory.h"
#include "product.h"
#include "vectors.h"

// Part of a handler's signature.
#define WINDOWS                                                                  \
  .Attr<bool>("channels_first").Attr<bool>("rectify")                            \
      .Attr<std::int64_t>("stride_rows").Attr<std::int64_t>("stride_columns")    \
      .Attr<std::int64_t>("pad_rows").Attr<std::int64_t>("pad_columns")

namespace {

// Images (batch, height, width, channels) and windows over them. The images of bytes that an
// environment gives, and a result, may have their channels first; all others have them last.
struct Images {
  Index batch, height, width, channels;
  explicit Images(ffi::AnyBuffer::Dimensions d, bool first = false)
      : batch(d[0]),
        height(d[first ? 2 : 1]),
        width(d[first ? 3 : 2]),
        channels(d[first ? 1 : 3]) {}
  Index size() const { return height * width * channels; }
};

struct Pair {
  Index rows, columns;
};

struct Windows {
  Images x, out;
  Pair size, stride, pad;  // pad: rows above and columns to the left
  Pair sides;              // of an image with all its borders

  Windows(Images x, ffi::AnyBuffer::Dimensions kernel, Images out, Pair stride, Pair pad)
      : x(x),
        out(out),
        size{kernel[0], kernel[1]},
        stride(stride),
        pad(pad),
        sides{(out.height - 1) * stride.rows + size.rows,
              (out.width - 1) * stride.columns + size.columns} {}

  Index numbers() const { return size.rows * size.columns * x.channels; }
};

// An image within borders of zeros, with zeros for its negative numbers if it is to be rectified;
// what lies beyond `sides` is cut off.
template <typename T>
void frame(const T* image, Pair image_sides, Index channels, Pair corner, Pair sides, bool rectify,
           T* out) {
  const Index row = sides.columns * channels;
  const Index above = std::min(corner.rows, sides.rows);
  const Index rows = std::min(sides.rows - above, image_sides.rows);
  const Index left = std::min(corner.columns, sides.columns) * channels;
  const Index count = std::min(row - left, image_sides.columns * channels);
  std::fill_n(out, above * row, T(0));
  for (Index y = 0; y < rows; ++y) {
    const T* from = image + y * image_sides.columns * channels;
    T* to = out + (above + y) * row;
    std::fill_n(to, left, T(0));
    if (rectify) {
      for (Index i = 0; i < count; ++i) to[left + i] = from[i] < 0 ? T(0) : from[i];
    } else {
      std::copy_n(from, count, to + left);
    }
    std::fill_n(to + left + count, row - left - count, T(0));
  }
  std::fill_n(out + (above + rows) * row, (sides.rows - above - rows) * row, T(0));
}

// The images of a convolution, numbers or bytes.
template <typename T>
struct Numbers {
  const T* data;
  bool rectify;
};

// The image that the windows slide over: itself if it needs no border, unless the caller means to
// read some numbers beyond its end, no more than a panel has.
template <typename T>
const T* bordered(const Windows& w, const Numbers<T>& x, Index n, bool beyond = false) {
  const T* image = x.data + n * w.x.size();
  if (!x.rectify && !beyond && w.pad.rows == 0 && w.pad.columns == 0 &&
      w.sides.columns == w.x.width) {
    return image;
  }
  T* copy = scratch<T, Slot::kRows>(w.sides.rows * w.sides.columns * w.x.channels);
  frame(image, {w.x.height, w.x.width}, w.x.channels, w.pad, w.sides, x.rectify, copy);
  return copy;
}

// Images of bytes, 0 to 255, stand for numbers from 0 to 1.
struct Bytes {
  const std::uint8_t* data;
  bool channels_first;
};

// One row of pixels, each with all of its channels, from the channels' rows, `plane` apart.
inline void interleave(const std::uint8_t* row, Index plane, Index count, Index channels,
                       std::uint8_t* to) {
  using Byte = std::uint8_t;
  constexpr Index n = kLanes<Byte>;
  if (channels != 4 || count < n) {
    for (Index i = 0; i < count; ++i) {
      for (Index c = 0; c < channels; ++c) to[i * channels + c] = row[i + c * plane];
    }
    return;
  }
  for (Index i = 0; i < count; i += n) {
    const Index at = std::min(i, count - n);
    Vector<Byte> of[4], pairs[4];
    for (Index c = 0; c < 4; ++c) of[c] = load(row + at + c * plane);
    zip<Byte>(of[0], of[2], pairs[0], pairs[1]);
    zip<Byte>(of[1], of[3], pairs[2], pairs[3]);
    zip<Byte>(pairs[0], pairs[2], of[0], of[1]);
    zip<Byte>(pairs[1], pairs[3], of[2], of[3]);
    for (Index c = 0; c < 4; ++c) store(to + 4 * at + c * n, of[c]);
  }
}

// bytes / 255, correctly rounded.
template <typename T>
void to_numbers(const std::uint8_t* bytes, Index count, T* to) {
  Index i = 0;
  if constexpr (sizeof(T) == 4) {
    typedef std::int32_t Integers __attribute__((vector_size(kBytes)));
    using Byte = std::uint8_t;
    using Word = std::uint16_t;
    for (; i + kLanes<Byte> <= count; i += kLanes<Byte>) {
      // Zipping with zeros widens bytes; compilers would convert them one by one.
      Vector<Byte> half[2];
      zip<Byte>(load(bytes + i), Vector<Byte>{}, half[0], half[1]);
      for (int h = 0; h < 2; ++h) {
        Vector<Word> quarter[2];
        zip<Word>((Vector<Word>)half[h], Vector<Word>{}, quarter[0], quarter[1]);
        for (int q = 0; q < 2; ++q) {
          const auto x = __builtin_convertvector((Integers)quarter[q], Vector<T>);
          store<T>(to + i + (2 * h + q) * kLanes<T>, x / T(255));
        }
      }
    }
  }
  for (; i < count; ++i) to[i] = bytes[i] / T(255);
}

template <typename T>
const T* bordered(const Windows& w, const Bytes& x, Index n, bool = false) {
  const Index channels = w.x.channels;
  T* copy = scratch<T, Slot::kRows>(w.sides.rows * w.sides.columns * channels);
  if (w.pad.rows || w.pad.columns) {
    std::fill_n(copy, w.sides.rows * w.sides.columns * channels, T(0));
  }
  const Index rows = std::min(w.sides.rows - w.pad.rows, w.x.height);
  const Index columns = std::min(w.sides.columns - w.pad.columns, w.x.width);
  std::uint8_t* joined = scratch<std::uint8_t, Slot::kPixels>(columns * channels);
  for (Index y = 0; y < rows; ++y) {
    const std::uint8_t* row = x.data + n * w.x.size();
    if (x.channels_first && channels > 1) {
      interleave(row + y * w.x.width, w.x.height * w.x.width, columns, channels, joined);
      row = joined;
    } else {
      row += y * w.x.width * channels;
    }
    to_numbers(row, columns * channels,
               copy + ((w.pad.rows + y) * w.sides.columns + w.pad.columns) * channels);
  }
  return copy;
}

template <typename T, typename Body>
void with_images(const In& x, bool channels_first, bool rectify, const Body& body) {
  if (x.element_type() == ffi::DataType::U8) {
    body(Bytes{in<std::uint8_t>(x), channels_first});
  } else {
    body(Numbers<T>{in<T>(x), rectify});
  }
}

}  // namespace
