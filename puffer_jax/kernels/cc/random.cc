// Random numbers as in `jax.random`, and draws from categorical distributions.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "ffi.h"
#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace {

typedef std::uint32_t Words __attribute__((vector_size(kBytes), aligned(4), may_alias));
constexpr Index kWords = kBytes / 4;

// Threefry-2x32 with 20 rounds (Salmon et al. 2011), as in `jax.random`, of the counters
// (0, first), (0, first + 1), ...
inline void threefry(const std::uint32_t* key, std::uint32_t first, Words& a, Words& b) {
  constexpr int rotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const std::uint32_t keys[] = {key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA};
  a = Words{} + keys[0];
  for (Index i = 0; i < kWords; ++i) b[i] = std::uint32_t(first + i);
  b += keys[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int turn = rotations[i % 2][r];
      a += b;
      b = ((b << turn) | (b >> (32 - turn))) ^ a;
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + std::uint32_t(i + 1);
  }
}

// Keys, each of two words; with two more, the first of the rows that are drawn, and how many rows
// they are among.
struct Keys {
  explicit Keys(const In& keys)
      : words(keys.dimensions().back()),
        count(keys.element_count() / words),
        data(in<std::uint32_t>(keys)) {}

  const std::uint32_t* operator[](Index number) const { return data + number * words; }
  Index first(Index number) const { return words == 4 ? (*this)[number][2] : 0; }
  Index total(Index number, Index rows) const { return words == 4 ? (*this)[number][3] : rows; }

  Index words, count;
  const std::uint32_t* data;
};

// For each key, (count, 2): both words of the counters 0 ... count - 1, or of those from its first.
ffi::Error Threefry(ffi::ThreadPool pool, In keys, Out words) {
  const Keys all(keys);
  const Index n = all.count, count = words->element_count() / 2 / n;
  std::uint32_t* result = out<std::uint32_t>(words);
  constexpr Index piece = 1 << 12;  // what one task does
  const Index pieces = (count + piece - 1) / piece, group = std::max<Index>(1, piece / count);
  const auto task_of = [&](Index task) {
    const Index begin = task % pieces * piece, end = std::min(count, begin + piece);
    const Index from = task / pieces * group;
    for (Index k = from; k < std::min(n, from + group); ++k) {
      for (Index i = begin; i < end; i += kWords) {
        Words a, b;
        threefry(all[k], std::uint32_t(all.first(k) + i), a, b);
        std::uint32_t* to = result + 2 * (k * count + i);
        for (Index j = 0; j < std::min(kWords, end - i); ++j) {
          to[2 * j] = a[j];
          to[2 * j + 1] = b[j];
        }
      }
    }
  };
  const Index tasks = pieces * ((n + group - 1) / group);
  return without_exceptions([&] { parallel(pool, tasks, task_of); });
}

// `kWords` numbers in [0, 1), as `jax.random.uniform` makes them from the counters from `first` on.
template <typename T>
inline void uniform(const std::uint32_t* key, Index first, T* to) {
  Words a, b;
  threefry(key, std::uint32_t(first), a, b);
  if constexpr (sizeof(T) == 4) {
    store<T>(to, std::bit_cast<Vector<T>>(((a ^ b) >> 9) | 0x3f800000u) - 1);
  } else {
    for (Index i = 0; i < kWords; ++i) {
      const std::uint64_t bits = std::uint64_t(a[i]) << 32 | b[i];
      to[i] = std::bit_cast<T>(bits >> 12 | 0x3ff0000000000000) - 1;
    }
  }
}

// The rows [first, last) of logits (rows, n), to be drawn from with one key. Where some rows of a
// larger draw are, `rows` is how many that has, and they are numbered as there.
struct Draw {
  const std::uint32_t* key;
  Index rows, n, first, last;
};

// `jax.random.categorical(key, logits, mode="high")` of logits (rows, n), for one key: the largest
// of the logits with Gumbel noise, -log(-log(1 - x)). Both arrays hold the rows of the draw.
template <typename T>
void categorical(const Draw& draw, const T* logits, std::int32_t* result) {
  const std::uint32_t* key = draw.key;
  const Index rows = draw.rows, n = draw.n, first = draw.first, last = draw.last;
  constexpr T fine = sizeof(T) == 4 ? T(1) / (1 << 23) : T(1) / (std::int64_t(1) << 52);
  const Index begin = first * n, end = last * n;
  T* scores = scratch<T, Slot::kScores>(end - begin + kLanes<T>);
  constexpr int N = kGroup / 2;
  constexpr Index piece = N * kLanes<T>;
  static_assert(piece % kWords == 0);
  for (Index at = begin; at < end; at += piece) {
    alignas(kBytes) T high[piece], low[piece];
    for (Index j = 0; j < piece; j += kWords) {
      uniform<T>(key, at + j, high + j);
      uniform<T>(key, rows * n + at + j, low + j);
    }
    Group<T, N> x, e, rest;
    EACH x[i] = load(high + i * kLanes<T>);
    EACH rest[i] = load(low + i * kLanes<T>) * fine + std::numeric_limits<T>::min();
    EACH x[i] = x[i] >= T(0.5) ? x[i] : x[i] + rest[i];
    // -log(1 - x), corrected for what rounding took from x.
    EACH e[i] = 1 - x[i];
    EACH rest[i] = 1 - e[i];
    logarithm<T, N>(e);
    EACH e[i] = rest[i] == 0 ? x[i] : -e[i] * (x[i] / rest[i]);
    logarithm<T, N>(e);
    EACH {
      const Index next = at + i * kLanes<T>;
      if (next >= end) continue;
      store(scores + next - begin, load(logits + next - begin, end - next) - e[i]);
    }
  }
  for (Index row = 0; row < last - first; ++row) {
    const T* of_row = scores + row * n;
    result[row] = std::int32_t(std::max_element(of_row, of_row + n) - of_row);
  }
}

// Calls `draw(key, Draw, index of its first row)` for pieces of the rows, in parallel: one key draws
// the actions of a whole array of logits.
template <class F>
ffi::Error each_draw(ffi::ThreadPool pool, In keys, In logits, F draw) {
  const Keys all(keys);
  const Index n = logits.dimensions().back(), draws = all.count;
  const Index rows = logits.element_count() / n / draws;
  const Index each = std::max<Index>(1, 2048 / n), pieces = (rows + each - 1) / each;
  return with_type(logits.element_type(), [&](auto zero) {
    parallel(pool, draws * pieces, [&](Index task) {
      const Index number = task / pieces, first = task % pieces * each;
      const Index before = all.first(number), last = std::min(rows, first + each);
      draw(zero, Draw{all[number], all.total(number, rows), n, before + first, before + last},
           number * rows + first);
    });
  });
}

ffi::Error Categorical(ffi::ThreadPool pool, In keys, In logits, Out result) {
  return each_draw(pool, keys, logits, [&](auto zero, const Draw& draw, Index row) {
    categorical(draw, in<decltype(zero)>(logits) + row * draw.n, out<std::int32_t>(result) + row);
  });
}

// The results of the draw's rows.
template <typename T>
struct Samples {
  std::int32_t* actions;
  T *logprobs, *entropies;
};

// As in `sample_logits`: actions, their log-probabilities, and entropies.
template <typename T>
void sample(const Draw& draw, const T* logits, const Samples<T>& results) {
  const Index n = draw.n, many = draw.last - draw.first;
  T *logprobs = results.logprobs, *entropies = results.entropies;
  T* normalised = scratch<T, Slot::kNormalised>(many * n);
  T* powers = scratch<T, Slot::kPowers>(many * n);
  T* logs = scratch<T, Slot::kLogs>(2 * many);
  T* largest = logs + many;
  for (Index row = 0; row < many; ++row) {
    const T* from = logits + row * n;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T most = -infinity;
    bool bad = false;
    for (Index k = 0; k < n; ++k) {
      bad |= !(from[k] < infinity);
      most = std::max(most, from[k]);
    }
    bad |= most == -infinity;
    logprobs[row] = entropies[row] = bad ? std::numeric_limits<T>::quiet_NaN() : T(0);
    largest[row] = bad ? T(0) : most;
    for (Index k = 0; k < n; ++k) {
      normalised[row * n + k] = bad ? T(0) : from[k];
      powers[row * n + k] = bad ? T(0) : from[k] - most;
    }
  }
  in_groups<T>(many * n, [&](auto size, Index at, Index left) {
    constexpr int N = size;
    Group<T, N> x, power, rest;
    load_group<T, N>(powers + at, left, x);
    EACH x[i] = at_least<T>(x[i], -kSteepest<T>);
    split_exponential<T, N>(x, power, rest);
    // Beyond that, it is nothing beside the largest one.
    EACH power[i] = x[i] > -kSteepest<T> ? power[i] * rest[i] + power[i] : Vector<T>{};
    store_group<T, N>(powers + at, left, power);
  });
  for (Index row = 0; row < many; ++row) {
    T sum = 0;
    for (Index k = 0; k < n; ++k) sum += powers[row * n + k];
    logs[row] = sum;
    for (Index k = 0; k < n; ++k) powers[row * n + k] /= sum;
  }
  in_groups<T>(many, [&](auto size, Index at, Index left) {
    constexpr int N = size;
    Group<T, N> x;
    load_group<T, N>(logs + at, left, x);
    EACH x[i] = at_least<T>(x[i], 1);  // what lies beyond the end is 0
    logarithm<T, N>(x);
    store_group<T, N>(logs + at, left, x);
  });
  for (Index row = 0; row < many; ++row) {
    const T log_sum = largest[row] + logs[row];
    T sum = 0;
    for (Index i = row * n; i < (row + 1) * n; ++i) {
      normalised[i] -= log_sum;
      if (powers[i] != 0) sum += normalised[i] * powers[i];
    }
    entropies[row] -= sum;
  }
  categorical(draw, normalised, results.actions);
  for (Index row = 0; row < many; ++row) {
    logprobs[row] += normalised[row * n + results.actions[row]];
  }
}

// Draws with key number `component` of those that the key is split into.
ffi::Error Sample(ffi::ThreadPool pool, In keys, In logits, Out actions, Out logprobs,
                  Out entropies, Index component) {
  return each_draw(pool, keys, logits, [&](auto zero, Draw draw, Index row) {
    using T = decltype(zero);
    Words a, b;
    threefry(draw.key, std::uint32_t(component), a, b);
    const std::uint32_t key[] = {a[0], b[0]};
    draw.key = key;
    const Samples<T> results{
        .actions = out<std::int32_t>(actions) + row,
        .logprobs = out<T>(logprobs) + row,
        .entropies = out<T>(entropies) + row,
    };
    sample(draw, in<T>(logits) + row * draw.n, results);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_threefry, Threefry,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_categorical, Categorical,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_sample, Sample,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET RET RET
                              .Attr<std::int64_t>("component"));
