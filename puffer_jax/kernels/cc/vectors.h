// Vectors of the processor's length, and functions of them.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

using Index = std::ptrdiff_t;

namespace {

// Set by the processor, or by tests: compilers offer vectors of any length on every processor.
#if !defined(VECTOR_BYTES) && defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif !defined(VECTOR_BYTES) && defined(__AVX__)
#define VECTOR_BYTES 32
#elif !defined(VECTOR_BYTES)
#define VECTOR_BYTES 16
#endif
constexpr int kBytes = VECTOR_BYTES;

// Rows of a tile, by the width of its panel: what fits into the registers. With few of them wide
// panels leave too few rows, and each vector of a panel is read too often.
#if VECTOR_BYTES == 64
constexpr int kTileRows[] = {0, 8, 8, 8, 6};
constexpr int kWidest = 4;
#elif VECTOR_BYTES == 32
constexpr int kTileRows[] = {0, 8, 6};
constexpr int kWidest = 2;
#else
constexpr int kTileRows[] = {0, 8, 6, 4, 4};
constexpr int kWidest = 4;
#endif

template <typename T>
constexpr Index kLanes = kBytes / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
inline Vector<T> load(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

template <typename T>
inline void store(T* p, Vector<T> v, Index count = kLanes<T>) {
  if (count >= kLanes<T>) {
    *reinterpret_cast<Vector<T>*>(p) = v;
  } else {
    for (Index i = 0; i < count; ++i) p[i] = v[i];
  }
}

template <typename T>
inline Vector<T> load(const T* p, Index count) {
  if (count >= kLanes<T>) return load(p);
  Vector<T> v{};
  for (Index i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

// Least and greatest; a NaN in x stays.
template <typename T>
inline Vector<T> at_most(Vector<T> x, T limit) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 least = _mm512_min_ps(_mm512_set1_ps(limit), std::bit_cast<__m512>(x));
    return std::bit_cast<Vector<T>>(least);
  }
#elif defined(__AVX__) && VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256 least = _mm256_min_ps(_mm256_set1_ps(limit), std::bit_cast<__m256>(x));
    return std::bit_cast<Vector<T>>(least);
  }
#endif
  return x > limit ? limit + Vector<T>{} : x;
}

template <typename T>
inline Vector<T> at_least(Vector<T> x, T limit) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512 greatest = _mm512_max_ps(_mm512_set1_ps(limit), std::bit_cast<__m512>(x));
    return std::bit_cast<Vector<T>>(greatest);
  }
#elif defined(__AVX__) && VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256 greatest = _mm256_max_ps(_mm256_set1_ps(limit), std::bit_cast<__m256>(x));
    return std::bit_cast<Vector<T>>(greatest);
  }
#endif
  return x < limit ? limit + Vector<T>{} : x;
}

// A few vectors that are computed side by side: each waits for itself at nearly every step, and
// processors do not look far enough ahead to find other work. A function of them says `EACH` before
// every statement, and is inlined, so that they stay in registers.
template <typename T, int N>
using Group = Vector<T>[N];
constexpr int kGroup = VECTOR_BYTES == 64 ? 8 : 4;
#define EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
#define INLINE __attribute__((always_inline)) inline

constexpr double kInverseFactorials[] = {
    1,           1,           1. / 2,       1. / 6,        1. / 24,        1. / 120,       1. / 720,
    1. / 5040,   1. / 40320,  1. / 362880,  1. / 3628800,  1. / 39916800,  1. / 479001600,
    1. / 6227020800};
// Beyond, an exponential and its inverse are not both normal numbers.
template <typename T>
constexpr T kSteepest = sizeof(T) == 4 ? 87 : 708;

// exp(x) = power * (1 + rest), |rest| small: what exp and expm1 both follow from.
template <typename T, int N>
INLINE void split_exponential(const Group<T, N>& x, Group<T, N>& power, Group<T, N>& rest) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Bits Integers __attribute__((vector_size(kBytes)));
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52;
  constexpr Bits bias = single ? 127 : 1023;
  // Adding it rounds to an integer, which is then in the lowest bits.
  constexpr T magic = T(1.5) * T(Bits(1) << mantissa);
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T ln2_low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  // Taylor's series; |r| <= ln(2)/2.
  constexpr int terms = single ? 7 : 13;
  Group<T, N> r;
  EACH power[i] = x[i] * T(1.44269504088896340736) + magic;
  EACH rest[i] = power[i] - magic;
  EACH r[i] = x[i] - rest[i] * ln2_high;
  EACH r[i] = r[i] - rest[i] * ln2_low;
  EACH rest[i] = r[i] * T(kInverseFactorials[terms]) + T(kInverseFactorials[terms - 1]);
#pragma GCC unroll 16
  for (int k = terms - 2; k >= 1; --k) EACH rest[i] = rest[i] * r[i] + T(kInverseFactorials[k]);
  EACH rest[i] = rest[i] * r[i];
  EACH power[i] =
      std::bit_cast<Vector<T>>((std::bit_cast<Integers>(power[i]) + bias) << mantissa);
}

// 1 / x, for x that is neither infinite nor subnormal.
template <typename T, int N>
INLINE void reciprocal(Group<T, N>& x) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  // Newton's steps from 14 correct bits take half the time of a division.
  if constexpr (sizeof(T) == 4) {
    Group<T, N> r;
    EACH r[i] = std::bit_cast<Vector<T>>(_mm512_rcp14_ps(std::bit_cast<__m512>(x[i])));
    EACH x[i] = 1 - x[i] * r[i];
    EACH x[i] = r[i] + r[i] * x[i];
    return;
  }
#endif
  EACH x[i] = 1 / x[i];
}

template <typename T, int N>
INLINE void tanh(Group<T, N>& x) {
  Group<T, N> power, rest;
  EACH x[i] = at_least<T>(at_most<T>(2 * x[i], 40), -40);
  split_exponential<T, N>(x, power, rest);
  EACH rest[i] = power[i] * rest[i] + (power[i] - 1);
  EACH x[i] = rest[i] + 2;
  reciprocal<T, N>(x);
  EACH x[i] *= rest[i];
}

// The LSTM's gates i, f, g, o, one set after the other: tanh of g, sigmoid of the others.
template <typename T, int N>
INLINE void squash(Group<T, N>& x) {
  Group<T, N> power, rest;
  EACH x[i] = at_least<T>(at_most<T>(i % 4 == 2 ? 2 * x[i] : -x[i], kSteepest<T>), -kSteepest<T>);
  split_exponential<T, N>(x, power, rest);
  EACH rest[i] = power[i] * rest[i] + (i % 4 == 2 ? power[i] - 1 : power[i]);
  EACH x[i] = rest[i] + T(i % 4 == 2 ? 2 : 1);
  reciprocal<T, N>(x);
  EACH if (i % 4 == 2) x[i] *= rest[i];
}

// The normal distribution's exp(-x^2 / 2) and its integral up to x: gelu(x) = x * integral.
template <typename T, int N>
INLINE void normal(const Group<T, N>& x, Group<T, N>& density, Group<T, N>& integral) {
  Group<T, N> t, sum;
  EACH t[i] = at_least<T>(x[i] * x[i] * T(-0.5), -kSteepest<T>);
  split_exponential<T, N>(t, density, sum);
  EACH density[i] = density[i] * sum[i] + density[i];
  if constexpr (sizeof(T) == 4) {
    // erfc(u) = exp(-u^2) * t * p(t), t = 1 / (1 + 0.4 u): fitted on [0, 14], 1.8e-8 relative.
    constexpr T p[] = {2.256901219e-01, 2.252956936e-01, 2.119279798e-01,
                          1.442230377e-01, 2.284485545e-01, -2.004911799e-01,
                          4.437526126e-01, -4.191528105e-01, 1.634078760e-01,
                          -2.310186750e-02};
    typedef std::int32_t Integers __attribute__((vector_size(kBytes)));
    EACH t[i] = std::bit_cast<Vector<T>>(std::bit_cast<Integers>(x[i]) & 0x7fffffff);
    EACH t[i] = at_most<T>(t[i], 1e30) * T(0.4 * 0.70710678118654752440) + 1;
    reciprocal<T, N>(t);
    EACH sum[i] = t[i] * p[9] + p[8];
#pragma GCC unroll 9
    for (int k = 7; k >= 0; --k) EACH sum[i] = sum[i] * t[i] + p[k];
    EACH sum[i] = sum[i] * (t[i] * density[i] * T(0.5));
    EACH integral[i] = x[i] < 0 ? sum[i] : 1 - sum[i];
  } else {
    EACH for (Index k = 0; k < kLanes<T>; ++k) {
      integral[i][k] = T(0.5) * std::erfc(x[i][k] * T(-0.70710678118654752440));
    }
  }
}

// log(x) for x > 0, neither subnormal nor infinite.
template <typename T, int N>
INLINE void logarithm(Group<T, N>& x) {
  if constexpr (sizeof(T) == 4) {
    // x = m 2^e with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(r), r = (m - 1) / (m + 1).
    typedef std::int32_t Integers __attribute__((vector_size(kBytes)));
    constexpr std::int32_t root = 0x3f3504f3;
    Group<T, N> m, e, r;
    EACH e[i] = __builtin_convertvector((std::bit_cast<Integers>(x[i]) - root) >> 23, Vector<T>);
    EACH m[i] = std::bit_cast<Vector<T>>(((std::bit_cast<Integers>(x[i]) - root) & 0x7fffff) +
                                         root);
    EACH r[i] = m[i] + 1;
    reciprocal<T, N>(r);
    EACH r[i] = (m[i] - 1) * r[i];
    // Taylor's series; |r| < 0.172.
    EACH m[i] = r[i] * r[i];
    EACH x[i] = m[i] * T(1. / 9) + T(1. / 7);
    EACH x[i] = x[i] * m[i] + T(1. / 5);
    EACH x[i] = x[i] * m[i] + T(1. / 3);
    EACH x[i] = x[i] * (m[i] * r[i]) + r[i];
    EACH x[i] = e[i] * T(0.69314718055994530942) + 2 * x[i];
  } else {
    EACH for (Index k = 0; k < kLanes<T>; ++k) x[i][k] = std::log(x[i][k]);
  }
}

// body(at, left) for the vectors of [0, count), in groups as long as there are enough; its first
// argument is a group's size.
template <typename T, typename Body>
INLINE void in_groups(Index count, const Body& body) {
  Index at = 0;
  constexpr Index whole = kGroup * kLanes<T>;
  for (; at + whole <= count; at += whole) body(std::integral_constant<int, kGroup>(), at, whole);
  for (; at < count; at += kLanes<T>) body(std::integral_constant<int, 1>(), at, count - at);
}

template <typename T, int N>
INLINE void load_group(const T* from, Index count, Group<T, N>& x) {
  EACH x[i] = N == 1 ? load(from, count) : load(from + i * kLanes<T>);
}

template <typename T, int N>
INLINE void store_group(T* to, Index count, const Group<T, N>& x) {
  EACH store(to + i * kLanes<T>, x[i], N == 1 ? count : kLanes<T>);
}

template <typename T>
inline T total(Vector<T> x) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(std::bit_cast<__m512>(x));
#endif
  T sum = 0;
  for (Index k = 0; k < kLanes<T>; ++k) sum += x[k];
  return sum;
}

}  // namespace
