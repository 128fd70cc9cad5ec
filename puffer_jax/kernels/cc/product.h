// The matrix product: tiles, panels and the rows that meet them.

#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "vectors.h"

namespace {

// A product as rows of A meet a panel of B:
//   sums[m][:] = sum over s, k of row(m)[s * segment + k * step]
//                                 * panel[s * panel_segment + k * panel_step + (0:width)].
template <typename T>
struct Product {
  Index segments, segment, length, step;
  const T* panel;
  Index panel_step, panel_segment = length * panel_step;
};

// out[m][:] = start[m][:] + the sums of rows row[m], for `rows` rows; without `start`, from zero.
// A separate function, since compilers run out of registers where it is inlined.
template <typename T, int width, int rows>
__attribute__((noinline)) void tile(const Product<T>& product, const T* const* row,
                                    const T* const* start, T* const* out) {
  Vector<T> sums[rows][width] = {};
  const Index step = product.step, b_step = product.panel_step, end = product.length * step;
  if (start) {  // needed last: on its way while the rest is computed
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) __builtin_prefetch(start[m]);
  }
  for (Index s = 0; s < product.segments; ++s) {
    const T* b = product.panel + s * product.panel_segment;
    const T* a[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) a[m] = row[m] + s * product.segment;
    for (Index k = 0; k < end; k += step) {
      Vector<T> column[width];
#pragma GCC unroll 4
      for (int v = 0; v < width; ++v) column[v] = load(b + v * kLanes<T>);
      b += b_step;
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < width; ++v) sums[m][v] += a[m][k] * column[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < width; ++v) {
      const Index at = v * kLanes<T>;
      store(out[m] + at, start ? load(start[m] + at) + sums[m][v] : sums[m][v]);
    }
  }
}

// How many of `count` rows come next, in pieces of at most `most` that are as even as possible: few
// rows take nearly as long as many.
inline Index even_share(Index count, Index most) { return count / ((count + most - 1) / most); }

// The smallest tile, from `least` to `most` rows, that is enough for `count`.
template <typename T, int width, int most, int least>
INLINE void tile_of(Index count, const Product<T>& product, const T* const* row,
                    const T* const* start, T* const* out) {
  if constexpr (most > least) {
    if (count < most) return tile_of<T, width, most - 1, least>(count, product, row, start, out);
  }
  tile<T, width, most>(product, row, start, out);
}

template <typename T>
const T* zero_start(Index) {
  return nullptr;
}

// Where rows lie that are evenly spaced. By value, since what a lambda captures by reference may be
// read anew after every vector that is stored.
template <typename T>
struct Rows {
  T* first;
  Index stride;
  INLINE T* operator()(Index m) const { return first + m * stride; }
};

// Whether a few more rows than a tile has go faster as one tile for each half of the panel.
template <int width>
constexpr bool kSplits = width == 4 && kTileRows[width] == 6 && kTileRows[width / 2] == 8;

// to(m)[0:columns] = start(m)[0:columns] + the sums of rows [0, count), which begin at from(m), for
// no more columns than the panel has; `start` may be `zero_start`.
template <typename T, int width, typename From, typename Start, typename To>
void multiply(const Product<T>& product, Index count, Index columns, const From& from,
              const Start& start, const To& to) {
  constexpr int rows = kTileRows[width], lanes = width * kLanes<T>;
  constexpr bool from_zero = std::is_same_v<Start, const T*(Index)>;
  const bool whole = columns >= lanes;
  alignas(kBytes) T spare[rows * lanes];
  const T* row[rows];
  const T* begin[rows];
  T* out[rows];
  for (Index first = 0, valid; first < count; first += valid) {
    valid = even_share(count - first, rows);
    if constexpr (kSplits<width>) {
      constexpr int half = width / 2;
      if (const Index left = count - first; rows < left && left <= kTileRows[half]) {
        for (Index at = 0; at < std::min<Index>(columns, lanes); at += lanes / 2) {
          Product<T> part = product;
          part.panel += at;
          const auto row_of = [&](Index m) { return from(first + m); };
          const auto end_of = [&](Index m) { return to(first + m) + at; };
          if constexpr (from_zero) {
            multiply<T, half>(part, left, columns - at, row_of, zero_start<T>, end_of);
          } else {
            const auto start_of = [&](Index m) { return start(first + m) + at; };
            multiply<T, half>(part, left, columns - at, row_of, start_of, end_of);
          }
        }
        return;
      }
    }
    for (Index m = 0; m < rows; ++m) {
      const Index at = first + std::min(m, valid - 1);
      row[m] = from(at);
      begin[m] = start(at);
      out[m] = whole && m < valid ? to(at) : spare + m * lanes;
    }
    const T* const* add = from_zero || !whole ? nullptr : begin;
    tile_of<T, width, rows, rows / 2>(valid, product, row, add, out);
    if (whole) continue;
    for (Index m = 0; m < valid; ++m) {
      T* final = to(first + m);
      for (Index i = 0; i < columns; ++i) final[i] = out[m][i] + (from_zero ? 0 : begin[m][i]);
    }
  }
}

// sum[0:columns] += the sum of the rows, `stride` apart.
template <typename T>
void add_rows(const T* data, Index rows, Index stride, Index columns, T* sum) {
  for (Index j = 0; j < columns; j += kLanes<T>) {
    const Index left = columns - j;
    Vector<T> total = load(sum + j, left);
    for (Index i = 0; i < rows; ++i) total += load(data + i * stride + j, left);
    store(sum + j, total, left);
  }
}

// A panel's width in vectors, so that `columns` fill panels as evenly as possible.
template <typename T>
int panel_width(Index columns) {
  const Index vectors = std::max<Index>(1, (columns + kLanes<T> - 1) / kLanes<T>);
  const Index panels = (vectors + kWidest - 1) / kWidest;
  return int((vectors + panels - 1) / panels);
}

template <typename Body>
void with_width(int width, const Body& body) {
  switch (width) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, std::min(3, kWidest)>());
    default: return body(std::integral_constant<int, kWidest>());
  }
}

// low and high: a[0], b[0], a[1], b[1], ...
template <typename T>
INLINE void zip(Vector<T> a, Vector<T> b, Vector<T>& low, Vector<T>& high) {
  [&]<int... k>(std::integer_sequence<int, k...>) {
    constexpr int n = kLanes<T>;
#if defined(__clang__)
    low = __builtin_shufflevector(a, b, (k / 2 + k % 2 * n)...);
    high = __builtin_shufflevector(a, b, (n / 2 + k / 2 + k % 2 * n)...);
#else
    using Integers = decltype(a < b);
    low = __builtin_shuffle(a, b, Integers{(k / 2 + k % 2 * n)...});
    high = __builtin_shuffle(a, b, Integers{(n / 2 + k / 2 + k % 2 * n)...});
#endif
  }(std::make_integer_sequence<int, kLanes<T>>());
}

// to[j][i] = from[i][j], for i < rows and j < columns; the rows of both lie that far apart.
template <typename T>
void transpose(const T* from, Index from_step, Index rows, Index columns, T* to, Index to_step) {
  constexpr int n = kLanes<T>;
  const Index whole = columns / n * n;
  Index i = 0;
  for (; i + n <= rows; i += n) {
    for (Index j = 0; j < whole; j += n) {
      Vector<T> block[n], next[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) block[r] = load(from + (i + r) * from_step + j);
      // Zipping row r with row r + n / 2, as often as n can be halved, transposes them.
#pragma GCC unroll 4
      for (int size = 1; size < n; size *= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < n / 2; ++r) {
          zip<T>(block[r], block[r + n / 2], next[2 * r], next[2 * r + 1]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) block[r] = next[r];
      }
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) store(to + (j + r) * to_step + i, block[r]);
    }
    for (Index j = whole; j < columns; ++j) {
      for (int r = 0; r < n; ++r) to[j * to_step + i + r] = from[(i + r) * from_step + j];
    }
  }
  for (; i < rows; ++i) {
    for (Index j = 0; j < columns; ++j) to[j * to_step + i] = from[i * from_step + j];
  }
}

// One panel: out[k][0:lanes] = matrix[k * step + (0:columns)], then zeros.
template <typename T>
void pack(const T* matrix, Index step, Index rows, Index columns, Index lanes, T* out) {
  for (Index k = 0; k < rows; ++k, out += lanes) {
    std::copy_n(matrix + k * step, columns, out);
    std::fill(out + columns, out + lanes, T(0));
  }
}

// One panel of the transpose: out[k][0:lanes] = matrix[k + (0:columns) * step], then zeros.
template <typename T>
void pack_transposed(const T* matrix, Index step, Index rows, Index columns, Index lanes, T* out) {
  transpose(matrix, step, columns, rows, out, lanes);
  if (columns == lanes) return;
  for (Index k = 0; k < rows; ++k, out += lanes) std::fill(out + columns, out + lanes, T(0));
}

// The panels of a matrix (rows, columns), or of its transpose.
template <typename T, Slot slot>
const T* panels_of(const T* matrix, Index rows, Index columns, bool transposed, Index lanes) {
  const Index panels = (columns + lanes - 1) / lanes;
  T* packed = scratch<T, slot>(panels * rows * lanes);
  for (Index p = 0; p < panels; ++p) {
    const Index count = std::min(lanes, columns - p * lanes);
    T* to = packed + p * rows * lanes;
    if (transposed) {
      pack_transposed(matrix + p * lanes * rows, rows, rows, count, lanes, to);
    } else {
      pack(matrix + p * lanes, columns, rows, count, lanes, to);
    }
  }
  return packed;
}

// out(m)[0:columns] = start(m) + from(m)[0:inner] @ the packed matrix.
template <typename T, typename From, typename Start, typename To>
void multiply_packed(const T* packed, Index inner, Index columns, Index rows, const From& from,
                     const Start& start, const To& to) {
  with_width(panel_width<T>(columns), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    for (Index p = 0; p < columns; p += lanes) {
      const Product<T> product{1, 0, inner, 1, packed + p * inner, lanes};
      if constexpr (std::is_same_v<Start, const T*(Index)>) {
        multiply<T, width>(product, rows, columns - p, from, zero_start<T>,
                           [&](Index m) { return to(m) + p; });
      } else {
        multiply<T, width>(
            product, rows, columns - p, from, [&](Index m) { return start(m) + p; },
            [&](Index m) { return to(m) + p; });
      }
    }
  });
}

template <typename T>
Index lanes_of(Index columns) {
  return panel_width<T>(columns) * kLanes<T>;
}

// The rows (sequences, say) of a block: they stay in cache while the weights pass by.
constexpr Index kBlock = 96;

// Rows a little longer than a power of two do not all fall into the same lines of a cache.
template <typename T>
constexpr Index row_stride(Index columns) {
  return (columns / kLanes<T> + 2) * kLanes<T>;
}

}  // namespace
