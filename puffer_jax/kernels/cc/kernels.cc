// The LSTM, convolutions, pooling, perceptrons and random numbers for CPUs, as XLA custom calls.
//
// Nearly all of it is one small matrix product (`tile`): rows of A read in place, where they lie in an
// image, a sequence or a matrix; a panel of B; the sums in registers. What XLA:CPU lacks is the
// choice of where the rows lie: it copies patches, states and transposes through memory.
//
// Work is split by shapes and the number of threads only, so results do not vary between calls.

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Index = std::ptrdiff_t;

namespace {

// --- vectors ---------------------------------------------------------------------------------

// Given by the processor, or by tests: compilers have vectors of any length on all of them.
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
    EACH m[i] = std::bit_cast<Vector<T>>(((std::bit_cast<Integers>(x[i]) - root) & 0x7fffff) + root);
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

// --- threads ---------------------------------------------------------------------------------

// Other threads wake up too late to help with less work, in cycles of one core.
constexpr Index kWorthwhile = 1 << 17;
// Between kernels no longer than this, threads stay awake; what is shorter is within a kernel.
constexpr std::chrono::microseconds kAwake(1000), kWithin(50);

// A kernel's tasks; whoever is there takes the next one.
struct Job {
  void (*body)(const void*, Index);
  const void* self;
  Index tasks;
  std::atomic<Index> next{0}, finished{0};

  void work() {
    for (Index i; (i = next.fetch_add(1)) < tasks;) {
      body(self, i);
      finished.fetch_add(1);
      finished.notify_one();
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Stays awake until `ready()`, but for no more than a moment, and giving way to other threads.
template <typename Ready>
bool awake_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
    // Two virtual cores may be one: what is left to the other is worth more than how often we ask.
    for (int i = 0; i < 16 && !ready(); ++i) pause();
  }
  return true;
}

// Threads of XLA's pool that help. A core that sleeps can take longer to wake than a kernel runs.
// So where kernels have followed each other closely, a helper stays awake for the next one;
// elsewhere XLA needs the thread for its own operations.
class Helpers {
 public:
  // Asks so many of them; who comes too late finds nothing left to do.
  void ask(ffi::ThreadPool& pool, Index count, const std::shared_ptr<Job>& job) {
    std::uint64_t number;
    {
      const std::lock_guard lock(mutex_);
      const auto pause = std::chrono::steady_clock::now() - ended_;
      if (pause > kWithin) soon_ = pause < kAwake;
      job_ = job;
      number = asked_.fetch_add(1) + 1;
      count -= awake_;
    }
    for (Index i = 0; i < count; ++i) pool.Schedule([this, job, number] { help(job, number); });
  }

 private:
  void help(std::shared_ptr<Job> job, std::uint64_t number) {
    for (;;) {
      job->work();
      std::unique_lock lock(mutex_);
      ended_ = std::chrono::steady_clock::now();
      if (asked_.load() == number && soon_) {
        ++awake_;
        lock.unlock();
        awake_until([&] { return asked_.load() != number; });
        lock.lock();
        --awake_;
      }
      if (asked_.load() == number) return;
      number = asked_.load();
      job = job_;
    }
  }

  std::mutex mutex_;
  std::shared_ptr<Job> job_;
  std::atomic<std::uint64_t> asked_{0};
  Index awake_ = 0;
  bool soon_ = false;
  std::chrono::steady_clock::time_point ended_;
};

// Never destroyed, for threads may still be there.
Helpers& helpers() {
  static Helpers& all = *new Helpers;
  return all;
}

// Runs body(0) ... body(tasks - 1), some of them in XLA's pool. The caller works, too, and waits only
// for what has begun, so a pool that is busy with other work cannot deadlock it.
template <typename Body>
void parallel(ffi::ThreadPool& pool, Index tasks, const Body& body, bool worth_it = true) {
  const Index others = std::min<Index>(tasks, pool.num_threads()) - 1;
  if (others < 1 || !worth_it) {
    for (Index i = 0; i < tasks; ++i) body(i);
    return;
  }
  const auto run = [](const void* self, Index i) { (*static_cast<const Body*>(self))(i); };
  const auto job = std::make_shared<Job>(run, &body, tasks);
  helpers().ask(pool, others, job);
  job->work();
  const auto done = [&] { return job->finished.load() == tasks; };
  if (awake_until(done)) return;
  for (Index n; (n = job->finished.load()) < tasks;) job->finished.wait(n);
}

// Where task `i` of `tasks` begins when `size` items are dealt out in whole groups.
inline Index share(Index size, Index group, Index i, Index tasks) {
  const Index groups = (size + group - 1) / group;
  return std::min(size, groups * i / tasks * group);
}

// Memory for one purpose, kept by the thread: fresh pages cost as much as the arithmetic on them.
template <typename T, int purpose>
T* scratch(Index size) {
  struct Memory {
    T* data = nullptr;
    Index size = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory memory;
  if (memory.size < size) {
    std::free(memory.data);
    const std::size_t bytes = (size * sizeof(T) + kBytes - 1) / kBytes * kBytes;
    memory.data = static_cast<T*>(std::aligned_alloc(kBytes, bytes));
    memory.size = size;
    if (memory.data == nullptr) throw std::bad_alloc();
  }
  return memory.data;
}

// Asks for large pages for a result that is about to be written. XLA's buffers are fresh memory in
// every call, and its first touch, page by page, can cost more than the arithmetic.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 1 << 12, large = 1 << 21;
  if (bytes < 2 * large) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// --- the product -----------------------------------------------------------------------------

// A product as rows of A meet a panel of B:
//   sums[m][:] = sum over s, k of row(m)[s * segment + k * step]
//                                 * panel[s * panel_segment + k * panel_step + (0:width)].
template <typename T>
struct Product {
  Index segments, segment, length, step;
  const T* panel;
  Index panel_step, panel_segment = length * panel_step;
};

// out[m][:] = start[m][:] + the sums of rows row[m], for so many rows; without `start` from zero.
// A function of its own, since within others compilers run out of registers.
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

// How many of `count` rows come next, in pieces of at most `most` and as even as can be: few rows
// take nearly as long as many.
inline Index even(Index count, Index most) { return count / ((count + most - 1) / most); }

// A tile of the least rows, of `most` to `least`, that are enough for `count`.
template <typename T, int width, int most, int least>
INLINE void tile_of(Index count, const Product<T>& product, const T* const* row,
                    const T* const* start, T* const* out) {
  if constexpr (most > least) {
    if (count < most) return tile_of<T, width, most - 1, least>(count, product, row, start, out);
  }
  tile<T, width, most>(product, row, start, out);
}

template <typename T>
const T* nothing(Index) {
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

// Whether a few rows more than a tile has go faster as a tile for each half of the panel.
template <int width>
constexpr bool kSplits = width == 4 && kTileRows[width] == 6 && kTileRows[width / 2] == 8;

// to(m)[0:columns] = start(m)[0:columns] + the sums of rows [0, count), which begin at from(m); of
// the columns no more than the panel has; `start` may be `nothing`.
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
    valid = even(count - first, rows);
    if constexpr (kSplits<width>) {
      constexpr int half = width / 2;
      if (const Index left = count - first; rows < left && left <= kTileRows[half]) {
        for (Index at = 0; at < std::min<Index>(columns, lanes); at += lanes / 2) {
          Product<T> part = product;
          part.panel += at;
          const auto row_of = [&](Index m) { return from(first + m); };
          const auto end_of = [&](Index m) { return to(first + m) + at; };
          if constexpr (from_zero) {
            multiply<T, half>(part, left, columns - at, row_of, nothing<T>, end_of);
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

// sum[0:columns] += the sum of so many rows, `stride` apart.
template <typename T>
void add_rows(const T* data, Index rows, Index stride, Index columns, T* sum) {
  for (Index j = 0; j < columns; j += kLanes<T>) {
    const Index left = columns - j;
    Vector<T> total = load(sum + j, left);
    for (Index i = 0; i < rows; ++i) total += load(data + i * stride + j, left);
    store(sum + j, total, left);
  }
}

// Vectors a panel is wide, so that `columns` fill panels as evenly as they can.
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

// to[j][i] = from[i][j], for i < rows and j < columns; rows of both so many numbers apart.
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

// --- buffers ---------------------------------------------------------------------------------

template <typename T>
const T* in(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* out(ffi::Result<ffi::AnyBuffer>& buffer) {
  prefer_large_pages(buffer->untyped_data(), buffer->size_bytes());
  return static_cast<T*>(buffer->untyped_data());
}

// A library serves one type: half the time to compile, for most users need no other.
#ifndef NUMBER
#define NUMBER float
#endif

template <typename Body>
ffi::Error with_type(ffi::DataType type, const Body& body) {
  constexpr ffi::DataType own = sizeof(NUMBER) == 4 ? ffi::DataType::F32 : ffi::DataType::F64;
  if (type != own) return ffi::Error::InvalidArgument("numbers of another type than expected");
  body(NUMBER());
  return ffi::Error::Success();
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

// --- LSTM ------------------------------------------------------------------------------------

// A block of so many sequences: its inputs stay in cache while the weights pass by.
constexpr Index kBlock = 96;
// Gates whose gradients of some steps stay in cache while the inputs' columns pass by.
constexpr Index kGates = 48;

// x is (batch * time, inputs), h (batch, hidden).
struct Shape {
  Index batch, time, inputs, hidden;
  Index parts, blocks;  // of the batch: parts run side by side, each some blocks long

  Shape(const In& x, const In& h, ffi::ThreadPool& pool)
      : batch(h.dimensions()[0]),
        time(x.dimensions()[0] / batch),
        inputs(x.dimensions()[1]),
        hidden(h.dimensions()[1]) {
    parts = std::clamp<Index>(pool.num_threads(), 1, std::max<Index>(1, batch / 6));
    blocks = parts * std::max<Index>(1, (batch + parts * kBlock - 1) / (parts * kBlock));
  }

  Index joined() const { return inputs + hidden; }
  Index begin(Index block) const { return share(batch, 2, block, blocks); }
  // Small blocks do what does not wait for the step before for some steps at once, so that the
  // weights pass by less often; more steps if they are too large for a core's cache.
  template <typename T>
  Index steps(Index rows) const {
    const bool large = 4 * hidden * joined() * sizeof(T) > (1 << 20);
    return std::clamp<Index>((large ? 3 : 1) * kBlock / std::max<Index>(1, rows), 1, time);
  }
  // Rows a little longer than a power of two do not all fall into the same lines of a cache.
  template <typename T>
  static Index stride(Index columns) {
    return (columns / kLanes<T> + 2) * kLanes<T>;
  }
};

// The rows x_t of the sequences [first, last).
template <typename T>
void copy_inputs(const Shape& shape, Index t, Index first, Index last, const T* x, T* rows,
                 Index stride) {
  for (Index r = first; r < last; ++r, rows += stride) {
    std::copy_n(x + (r * shape.time + t) * shape.inputs, shape.inputs, rows);
  }
}

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

// kept (time, batch, 5, hidden), if any: the gates i, f, g, o and the cell, for the gradient.
// `outputs` may lie where `x` does.
template <typename T>
void lstm_forward(ffi::ThreadPool& pool, const Shape& shape, const T* of_x, const T* of_h,
                  const T* bias, const T* x, const T* h, const T* c, const bool* done, T* outputs,
                  T* h_last, T* c_last, T* kept) {
  const Index hidden = shape.hidden, joined = shape.joined(), time = shape.time;
  const Index inputs = shape.inputs;
  constexpr Index lanes = kLanes<T>;
  const Index panels = (hidden + lanes - 1) / lanes;
  T* packed = scratch<T, 0>(panels * 4 * lanes * (joined + 1));
  T* biases = packed + panels * 4 * lanes * joined;
  // The four gates of as many units as a vector has lanes, side by side in as few panels as can be.
  constexpr Index piece = kWidest * lanes;
  parallel(pool, panels, [&](Index p) {
    const Index units = std::min(lanes, hidden - p * lanes);
    for (Index gate = 0; gate < 4; ++gate) {
      const Index row = gate * hidden + p * lanes;
      T* own = biases + (p * 4 + gate) * lanes;
      std::copy_n(bias + row, units, own);
      std::fill(own + units, own + lanes, T(0));
      T* to = packed + (p * 4 + gate / kWidest * kWidest) * lanes * joined + gate % kWidest * lanes;
      transpose(of_x + row * inputs, inputs, units, inputs, to, piece);
      transpose(of_h + row * hidden, hidden, units, hidden, to + inputs * piece, piece);
      if (units == lanes) continue;
      for (Index k = 0; k < joined; ++k, to += piece) std::fill(to + units, to + lanes, T(0));
    }
  });
  // to(m)[0:4 * lanes] = start(m) + from(m) @ these units' weights of the inputs [begin, end).
  const auto gates_of = [packed, joined](Index p, Index begin, Index end, Index count,
                                         Rows<const T> from, Rows<const T> start, Rows<T> to) {
    const T* panel = packed + p * 4 * lanes * joined + begin * piece;
    for (Index at = 0; at < 4 * lanes; at += piece, panel += piece * joined) {
      multiply<T, kWidest>({1, 0, end - begin, 1, panel, piece}, count, piece, from, start, to);
      start.first += piece;
      to.first += piece;
    }
  };
  const auto block = [=](Index first, Index last) {
    const Index rows = last - first, steps = shape.steps<T>(rows), slots = std::max<Index>(2, steps);
    const Index stride = Shape::stride<T>(joined), wide = 4 * lanes;
    // Rows whose gates are made before the first of them is needed, and how many if there are more.
    constexpr int tile_rows = kTileRows[kWidest];
    constexpr int most_rows = kSplits<kWidest> ? kTileRows[kWidest / 2] : 2 * tile_rows;
    constexpr int many_rows = kSplits<kWidest> ? tile_rows : most_rows;
    // Rows [x_t, h_{t-1}], and of some steps what x_t gives to the gates: (panels, rows, wide).
    T* slot = scratch<T, 1>(slots * rows * stride);
    T* given = scratch<T, 2>(steps > 1 ? panels * steps * rows * wide : 0);
    T* cells = c_last + first * hidden;
    std::copy_n(c + first * hidden, rows * hidden, cells);
    const auto rows_of = [=](Index t) { return slot + t % slots * rows * stride; };
    const auto begun = [=](Index m, Index t) { return done[(first + m) * time + t]; };
    for (Index m = 0; m < rows; ++m) {
      std::copy_n(h + (first + m) * hidden, hidden, slot + m * stride + inputs);
    }
    const Index own = steps > 1 ? inputs : 0;  // the rows' part left to each step begins here
    for (Index t = 0; t < time; ++t) {
      const Index step = t % steps;
      if (step == 0) {
        const Index ahead = std::min(steps, time - t);
        for (Index i = 0; i < ahead; ++i) {
          copy_inputs(shape, t + i, first, last, x, rows_of(t + i), stride);
        }
        for (Index p = 0; p < panels && steps > 1; ++p) {
          gates_of(p, 0, inputs, ahead * rows, {slot, stride}, {biases + p * wide, 0},
                   {given + p * steps * rows * wide, wide});
        }
      }
      T* now = rows_of(t);
      T* next = rows_of(t + 1) + inputs;
      for (Index m = 0; m < rows; ++m) {
        if (begun(m, t)) std::fill_n(now + m * stride + inputs, hidden, T(0));
      }
      for (Index p = 0; p < panels; ++p) {
        const Index units = std::min(lanes, hidden - p * lanes);
        const T* start = own ? given + (p * steps + step) * rows * wide : biases + p * wide;
        alignas(kBytes) T sums[most_rows * 4 * lanes];
        for (Index m = 0, valid; m < rows; m += valid) {
          valid = rows - m <= most_rows ? rows - m : even(rows - m, many_rows);
          gates_of(p, own, joined, valid, {now + m * stride + own, stride},
                   own ? Rows<const T>{start + m * wide, wide} : Rows<const T>{start, 0},
                   {sums, wide});
          T* cell = cells + m * hidden + p * lanes;
          T* keep = nullptr;
          if (kept) keep = kept + (t * shape.batch + first + m) * 5 * hidden + p * lanes;
          T* last = next + m * stride + p * lanes;
          const auto update = [=, &sums](auto side_by_side, Index i) {
            constexpr int N = side_by_side;
            Group<T, 4 * N> gates;
            load_group<T, 4 * N>(sums + i * wide, N * wide, gates);
            squash<T, 4 * N>(gates);
#pragma GCC unroll 2
            for (int k = 0; k < N; ++k) {
              const Index r = i + k;
              T* of_cell = cell + r * hidden;
              const Vector<T> before = begun(m + r, t) ? Vector<T>{} : load(of_cell, units);
              const Vector<T> after = gates[4 * k + 1] * before + gates[4 * k] * gates[4 * k + 2];
              store(of_cell, after, units);
              store(last + r * stride, gates[4 * k + 3], units);
              if (keep == nullptr) continue;
              T* to = keep + r * 5 * hidden;
#pragma GCC unroll 4
              for (int g = 0; g < 4; ++g) store(to + g * hidden, gates[4 * k + g], units);
              store(to + 4 * hidden, after, units);
            }
          };
          Index i = 0;
          // Two at once need more registers than others have.
          for (; kBytes == 64 && i + 1 < valid; i += 2) update(std::integral_constant<int, 2>(), i);
          for (; i < valid; ++i) update(std::integral_constant<int, 1>(), i);
        }
      }
      // A cell's tanh waits for its gates: later, beside those of many others.
      for (Index m = 0; m < rows; ++m) {
        const T* cell = cells + m * hidden;
        T* state = next + m * stride;
        T* output = outputs + ((first + m) * time + t) * hidden;
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
    }
    const T* after = rows_of(time) + inputs;
    for (Index m = 0; m < rows; ++m) {
      T* to = h_last + (first + m) * hidden;
      if (h_last != outputs) std::copy_n(after + m * stride, hidden, to);
    }
  };
  parallel(pool, shape.blocks, [&](Index i) { block(shape.begin(i), shape.begin(i + 1)); });
}

ffi::Error LstmForward(ffi::ThreadPool pool, In of_x, In of_h, In bias, In x, In h, In c, In done,
                       Out outputs, Out h_last, Out c_last, Out kept) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    T* keep = kept->element_count() ? out<T>(kept) : nullptr;
    lstm_forward<T>(pool, Shape(x, h, pool), in<T>(of_x), in<T>(of_h), in<T>(bias), in<T>(x),
                    in<T>(h), in<T>(c), in<bool>(done), out<T>(outputs), out<T>(h_last),
                    out<T>(c_last), keep);
  });
}

// One step for acting. The batch is small, so the weights stay where they are: they are the rows,
// and panels of the transposed inputs pass them by. From so many states on, packing them pays.
constexpr Index kManyStates = 1024;

template <typename T, int width>
void lstm_step(ffi::ThreadPool& pool, Index batch, Index inputs, Index hidden, const T* of_x,
               const T* of_h, const T* bias, const T* x, const T* h, const T* c, T* h_next,
               T* c_next) {
  constexpr Index lanes = kLanes<T>, wide = width * lanes, kUnits = 16;
  const Index panels = (batch + wide - 1) / wide, groups = (hidden + kUnits - 1) / kUnits;
  const Index size = (inputs + 2 * hidden) * wide;
  const bool large = batch * (inputs + hidden) * hidden * 4 / (2 * lanes) > kWorthwhile;
  T* packed = scratch<T, 0>(panels * size);
  parallel(pool, panels, [&](Index p) {
    const Index first = p * wide, count = std::min(wide, batch - first);
    T* panel = packed + p * size;
    pack_transposed(x + first * inputs, inputs, inputs, count, wide, panel);
    pack_transposed(h + first * hidden, hidden, hidden, count, wide, panel + inputs * wide);
    T* cells = panel + (inputs + hidden) * wide;
    pack_transposed(c + first * hidden, hidden, hidden, count, wide, cells);
  }, large);
  parallel(pool, panels * groups, [&](Index task) {
    const Index first = task / groups * wide, count = std::min(wide, batch - first);
    const Index unit = task % groups * kUnits, units = std::min(kUnits, hidden - unit);
    const T* panel = packed + task / groups * size;
    alignas(kBytes) T gates[4 * kUnits][wide];
    // Row m is of a unit's gate; where there are too few units, the last one's again.
    const auto row = [&](Index m) {
      return m / kUnits * hidden + unit + std::min(m % kUnits, units - 1);
    };
    const auto to = [&](Index m) { return gates[m]; };
    multiply<T, width>(
        {1, 0, inputs, 1, panel, wide}, 4 * kUnits, wide,
        [&](Index m) { return of_x + row(m) * inputs; }, nothing<T>, to);
    multiply<T, width>(
        {1, 0, hidden, 1, panel + inputs * wide, wide}, 4 * kUnits, wide,
        [&](Index m) { return of_h + row(m) * hidden; }, to, to);
    // Cells take the place of the first gate, then their tanh times the last one that of the second.
    for (Index m = 0; m < units; ++m) {
      const T* own = bias + unit + m;
      const T* cells = panel + (inputs + hidden + unit + m) * wide;
      // Two at once need more registers than others have.
      constexpr int side_by_side = width % 2 || kBytes < 64 ? 1 : 2;
      for (Index v = 0; v < wide; v += side_by_side * lanes) {
        constexpr int N = 4 * side_by_side;
        Group<T, N> all;
        EACH all[i] = load(gates[i % 4 * kUnits + m] + v + i / 4 * lanes) + own[i % 4 * hidden];
        squash<T, N>(all);
#pragma GCC unroll 2
        for (int k = 0; k < side_by_side; ++k) {
          const Index at = v + k * lanes;
          store(gates[m] + at, all[4 * k + 1] * load(cells + at) + all[4 * k] * all[4 * k + 2]);
          store(gates[3 * kUnits + m] + at, all[4 * k + 3]);
        }
      }
    }
    in_groups<T>(units * wide, [&](auto size, Index j, Index left) {
      constexpr int N = size;
      Group<T, N> squashed, last;
      load_group<T, N>(gates[0] + j, left, squashed);
      load_group<T, N>(gates[3 * kUnits] + j, left, last);
      tanh<T, N>(squashed);
      EACH squashed[i] *= last[i];
      store_group<T, N>(gates[kUnits] + j, left, squashed);
    });
    const Index at = first * hidden + unit;
    transpose(gates[0], wide, units, count, c_next + at, hidden);
    transpose(gates[kUnits], wide, units, count, h_next + at, hidden);
  }, large);
}

ffi::Error LstmStep(ffi::ThreadPool pool, In of_x, In of_h, In bias_x, In bias_h, In x, In h, In c,
                    Out h_next, Out c_next) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index batch = x.dimensions()[0], inputs = x.dimensions()[1], hidden = h.dimensions()[1];
    T* bias = scratch<T, 6>(4 * hidden);
    for (Index i = 0; i < 4 * hidden; ++i) bias[i] = in<T>(bias_x)[i] + in<T>(bias_h)[i];
    if (batch >= kManyStates) {
      bool* never = scratch<bool, 7>(batch);
      std::fill_n(never, batch, false);
      lstm_forward<T>(pool, Shape(x, h, pool), in<T>(of_x), in<T>(of_h), bias, in<T>(x), in<T>(h),
                      in<T>(c), never, out<T>(h_next), out<T>(h_next), out<T>(c_next), nullptr);
      return;
    }
    with_width(panel_width<T>(batch), [&](auto width) {
      lstm_step<T, width>(pool, batch, inputs, hidden, in<T>(of_x), in<T>(of_h), bias, in<T>(x),
                          in<T>(h), in<T>(c), out<T>(h_next), out<T>(c_next));
    });
  });
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
  T* packed = scratch<T, 0>((x_panels + h_panels) * wide * gates);
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
  T* others = scratch<T, 4>((shape.parts - 1) * size);
  const auto sums_of = [&](Index part) {
    if (part == 0) return Sums{d_of_x, d_of_h, d_bias};
    T* own = others + (part - 1) * size;
    return Sums{own, own + size_x, own + size_x + size_h};
  };

  const auto block = [=](Index first, Index last, const Sums& sums) {
    const Index rows = last - first;
    const Index stride = Shape::stride<T>(joined), d_stride = Shape::stride<T>(gates);
    const Index slots = shape.steps<T>(rows);
    T* inputs_rows = scratch<T, 1>(slots * rows * stride);
    T* d_rows = scratch<T, 2>(slots * rows * d_stride);
    T* tanh_row = scratch<T, 3>(hidden);
    T** of_dx = scratch<T*, 0>(slots * rows);
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
        const T* before = t ? keep - shape.batch * 5 * hidden + 4 * hidden : c + (first + r) * hidden;
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

// --- recurrence ------------------------------------------------------------------------------

// y[t] = a[t] + b[t] * y[t + 1] along the rows, from the last on.
template <typename T>
void recur(ffi::ThreadPool& pool, Index rows, Index time, const T* a, const T* b, T* y) {
  constexpr Index kRows = 8;  // side by side: each waits for itself only
  const Index blocks = (rows + kRows - 1) / kRows, tasks = std::min(blocks, Index(64));
  parallel(pool, tasks, [&](Index task) {
    for (Index i = blocks * task / tasks; i < blocks * (task + 1) / tasks; ++i) {
      const Index first = i * kRows, count = std::min(kRows, rows - first);
      T last[kRows] = {};
      for (Index t = time - 1; t >= 0; --t) {
        for (Index r = 0; r < count; ++r) {
          const Index at = (first + r) * time + t;
          y[at] = last[r] = a[at] + b[at] * last[r];
        }
      }
    }
  });
}

ffi::Error Recur(ffi::ThreadPool pool, In a, In b, Out y) {
  return with_type(a.element_type(), [&](auto zero) {
    using T = decltype(zero);
    recur<T>(pool, a.dimensions()[0], a.dimensions()[1], in<T>(a), in<T>(b), out<T>(y));
  });
}

// --- random numbers --------------------------------------------------------------------------

typedef std::uint32_t Words __attribute__((vector_size(kBytes), aligned(4), may_alias));
constexpr Index kWords = kBytes / 4;

// Threefry-2x32 with 20 rounds (Salmon et al. 2011), as in `jax.random`, of the counters (0, first),
// (0, first + 1), ...
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

// For each key, (count, 2): both words of the counters 0 ... count - 1.
ffi::Error Threefry(ffi::ThreadPool pool, In keys, Out words) {
  const std::uint32_t* key = in<std::uint32_t>(keys);
  const Index n = keys.element_count() / 2, count = words->element_count() / 2 / n;
  std::uint32_t* result = out<std::uint32_t>(words);
  constexpr Index piece = 1 << 12;  // of what one task does
  const Index pieces = (count + piece - 1) / piece, group = std::max<Index>(1, piece / count);
  parallel(pool, pieces * ((n + group - 1) / group), [&](Index task) {
    const Index begin = task % pieces * piece, end = std::min(count, begin + piece);
    const Index from = task / pieces * group;
    for (Index k = from; k < std::min(n, from + group); ++k) {
      for (Index i = begin; i < end; i += kWords) {
        Words a, b;
        threefry(key + 2 * k, std::uint32_t(i), a, b);
        std::uint32_t* to = result + 2 * (k * count + i);
        for (Index j = 0; j < std::min(kWords, end - i); ++j) {
          to[2 * j] = a[j];
          to[2 * j + 1] = b[j];
        }
      }
    }
  });
  return ffi::Error::Success();
}

// `kWords` numbers in [0, 1), as `jax.random.uniform` makes them of the counters from `first` on.
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

// `jax.random.categorical(key, logits, mode="high")` of logits (rows, n), for one key: the largest
// of the logits with Gumbel noise, -log(-log(1 - x)). Logits and result are of the rows [first, last).
template <typename T>
void categorical(const std::uint32_t* key, const T* logits, Index rows, Index n, Index first,
                 Index last, std::int32_t* result) {
  constexpr T fine = sizeof(T) == 4 ? T(1) / (1 << 23) : T(1) / (std::int64_t(1) << 52);
  const Index begin = first * n, end = last * n;
  T* scores = scratch<T, 5>(end - begin + kLanes<T>);
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

ffi::Error Categorical(ffi::ThreadPool pool, In keys, In logits, Out result) {
  const Index n = logits.dimensions().back(), draws = keys.element_count() / 2;
  const Index rows = logits.element_count() / n / draws;
  return with_type(logits.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index each = std::max<Index>(1, 2048 / n), pieces = (rows + each - 1) / each;
    parallel(pool, draws * pieces, [&](Index task) {
      const Index draw = task / pieces, first = task % pieces * each, at = draw * rows + first;
      categorical<T>(in<std::uint32_t>(keys) + 2 * draw, in<T>(logits) + at * n, rows, n, first,
                     std::min(rows, first + each), out<std::int32_t>(result) + at);
    });
  });
}

// As in `sample_logits`: actions, their log-probabilities, and entropies, of logits (rows, n). All
// but the key and `rows` are of the rows [first, last).
template <typename T>
void sample(const std::uint32_t* key, const T* logits, Index rows, Index n, Index first,
            Index last, std::int32_t* actions, T* logprobs, T* entropies) {
  const Index many = last - first;
  T* normalised = scratch<T, 10>(many * n);
  T* powers = scratch<T, 11>(many * n);
  T* logs = scratch<T, 12>(2 * many);
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
    // Beyond, it is nothing beside the largest one.
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
  categorical(key, normalised, rows, n, first, last, actions);
  for (Index row = 0; row < many; ++row) logprobs[row] += normalised[row * n + actions[row]];
}

// With the key of number `component` that the given one is split into.
ffi::Error Sample(ffi::ThreadPool pool, In keys, In logits, Out actions, Out logprobs,
                  Out entropies, Index component) {
  const Index n = logits.dimensions().back(), draws = keys.element_count() / 2;
  const Index rows = logits.element_count() / n / draws;
  return with_type(logits.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index each = std::max<Index>(1, 2048 / n), pieces = (rows + each - 1) / each;
    parallel(pool, draws * pieces, [&](Index task) {
      const Index draw = task / pieces, first = task % pieces * each, at = draw * rows + first;
      Words a, b;
      threefry(in<std::uint32_t>(keys) + 2 * draw, std::uint32_t(component), a, b);
      const std::uint32_t key[] = {a[0], b[0]};
      sample<T>(key, in<T>(logits) + at * n, rows, n, first, std::min(rows, first + each),
                out<std::int32_t>(actions) + at, out<T>(logprobs) + at, out<T>(entropies) + at);
    });
  });
}

// --- perceptron ------------------------------------------------------------------------------

// x (batch, inputs) -> gelu(x @ w1 + b1) (batch, hidden), and from that, if `outputs`, (batch,
// outputs): @ w2 + b2. Hidden vectors stay in cache, and are computed anew for the gradient.
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

// The panels of a matrix (rows, columns), or of its transpose.
template <typename T, int purpose>
const T* panels_of(const T* matrix, Index rows, Index columns, bool transposed, Index lanes) {
  const Index panels = (columns + lanes - 1) / lanes;
  T* packed = scratch<T, purpose>(panels * rows * lanes);
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
void times(const T* packed, Index inner, Index columns, Index rows, const From& from,
           const Start& start, const To& to) {
  with_width(panel_width<T>(columns), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    for (Index p = 0; p < columns; p += lanes) {
      const Product<T> product{1, 0, inner, 1, packed + p * inner, lanes};
      if constexpr (std::is_same_v<Start, const T*(Index)>) {
        multiply<T, width>(product, rows, columns - p, from, nothing<T>,
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

// So few outputs would leave most lanes of a panel empty, but their sums fit into registers.
constexpr Index kFewOutputs = 8;

// body(count) with a constant for `count`, of at most kFewOutputs.
template <typename Body>
void with_few(Index count, const Body& body) {
  [&]<int... n>(std::integer_sequence<int, n...>) {
    ((count == n + 1 ? body(std::integral_constant<int, n + 1>()) : void()), ...);
  }(std::make_integer_sequence<int, kFewOutputs>());
}

// to[n] = bias[n] + x[0:inputs] . weights[n], for n < N; weights `stride` apart.
template <typename T, int N>
INLINE void dots(const T* x, Index inputs, const T* weights, Index stride, const T* bias, T* to) {
  Vector<T> sums[N] = {};
  for (Index j = 0; j < inputs; j += kLanes<T>) {
    const Vector<T> part = load(x + j, inputs - j);
    EACH sums[i] += part * load(weights + i * stride + j);
  }
  EACH to[i] = bias[i] + total<T>(sums[i]);
}

// Linear layers of the same vectors, computed as one: each has weights (inputs, outputs), a bias,
// and a result (batch, outputs).
template <typename T>
class Heads {
 public:
  Heads(Index inputs, const ffi::RemainingArgs& layers, const ffi::RemainingRets& results)
      : inputs_(inputs), count_(layers.size() / 2) {
    for (Index i = 0; i < count_; ++i) outputs_ += layers.get<In>(2 * i + 1)->element_count();
    T* joined = scratch<T, 7>((inputs + 1) * outputs_);
    heads_ = scratch<Head, 8>(count_);
    for (Index i = 0, column = 0; i < count_; column += heads_[i++].outputs) {
      const In weights = *layers.get<In>(2 * i), bias = *layers.get<In>(2 * i + 1);
      Out result = *results.get<In>(i);
      heads_[i] = {Index(bias.element_count()), out<T>(result)};
      for (Index k = 0; k <= inputs; ++k) {
        const T* from = k < inputs ? in<T>(weights) + k * heads_[i].outputs : in<T>(bias);
        std::copy_n(from, heads_[i].outputs, joined + k * outputs_ + column);
      }
    }
    bias_ = joined + inputs * outputs_;
    stride_ = (inputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    if (outputs_ > kFewOutputs) {
      weights_ = panels_of<T, 1>(joined, inputs, outputs_, false, lanes_of<T>(outputs_));
    } else {
      T* few = scratch<T, 6>(kFewOutputs * stride_);
      pack_transposed(joined, outputs_, outputs_, inputs, stride_, few);
      weights_ = few;
    }
  }

  Index outputs() const { return outputs_; }

  // The rows [first, first + rows) of the results, from these vectors.
  void operator()(Index first, Index rows, const T* vectors, Index stride) const {
    T* all = count_ == 1 ? heads_[0].result + first * outputs_ : scratch<T, 9>(rows * outputs_);
    if (outputs_ > kFewOutputs) {
      times<T>(
          weights_, inputs_, outputs_, rows, [&](Index m) { return vectors + m * stride; },
          [&](Index) { return bias_; }, [&](Index m) { return all + m * outputs_; });
    } else {
      with_few(outputs_, [&](auto count) {
        for (Index m = 0; m < rows; ++m) {
          dots<T, count>(vectors + m * stride, inputs_, weights_, stride_, bias_,
                         all + m * outputs_);
        }
      });
    }
    for (Index i = 0, column = 0; i < count_ && count_ > 1; column += heads_[i++].outputs) {
      const Head head = heads_[i];
      for (Index m = 0; m < rows; ++m) {
        std::copy_n(all + m * outputs_ + column, head.outputs,
                    head.result + (first + m) * head.outputs);
      }
    }
  }

 private:
  struct Head {
    Index outputs;
    T* result;
  };
  Index inputs_, count_, outputs_ = 0, stride_;
  Head* heads_;
  const T *weights_, *bias_;
};

template <typename T>
void perceptron(ffi::ThreadPool& pool, const Layers& shape, const T* x, const T* w1, const T* b1,
                const Heads<T>* heads, T* result) {
  const Index inputs = shape.inputs, hidden = shape.hidden;
  const T* weights = panels_of<T, 0>(w1, inputs, hidden, false, lanes_of<T>(hidden));
  parallel(pool, shape.blocks, [&](Index i) {
    const Index first = shape.begin(i), rows = shape.begin(i + 1) - first;
    const Index stride = heads ? Shape::stride<T>(hidden) : hidden;
    T* activations = heads ? scratch<T, 2>(rows * stride) : result + first * hidden;
    times<T>(
        weights, inputs, hidden, rows, [&](Index m) { return x + (first + m) * inputs; },
        [&](Index) { return b1; }, [&](Index m) { return activations + m * stride; });
    for (Index m = 0; m < rows; ++m) gelu<T>(activations + m * stride, hidden);
    if (heads) (*heads)(first, rows, activations, stride);
  });
}

// For so many rows of x and d: dx = d @ weights, or added to it, and d_weights += d^T @ x; of N
// columns of d. Weights are (N, stride), rows of d `outputs` apart.
template <typename T, int N, int rows>
void few_gradients(const T* x, Index inputs, const T* d, Index outputs, const T* weights,
                   Index stride, bool add, T* dx, T* d_weights) {
  const auto some = [&](Index j, auto whole) {
    const Index count = whole ? kLanes<T> : inputs - j;
    Vector<T> given[rows], back[rows] = {};
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) {
      given[m] = load(x + m * inputs + j, count);
      if (add) back[m] = load(dx + m * inputs + j, count);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector<T> weight = load(weights + n * stride + j);
      Vector<T> sum = load(d_weights + n * stride + j);
#pragma GCC unroll 4
      for (int m = 0; m < rows; ++m) {
        sum += given[m] * d[m * outputs + n];
        back[m] += weight * d[m * outputs + n];
      }
      store(d_weights + n * stride + j, sum);
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; ++m) store(dx + m * inputs + j, back[m], count);
  };
  Index j = 0;
  for (; j + kLanes<T> <= inputs; j += kLanes<T>) some(j, std::true_type());
  if (j < inputs) some(j, std::false_type());
}

// Of x (batch, inputs) @ weights (inputs, outputs) + bias.
template <typename T>
void linear_gradient(ffi::ThreadPool& pool, Index batch, Index inputs, Index outputs, const T* x,
                     const T* weights, const T* d, T* dx, T* d_weights, T* d_bias) {
  const Index most = batch * inputs > kWorthwhile ? std::max<Index>(1, batch / 32) : 1;
  const Index parts = std::clamp<Index>(pool.num_threads(), 1, most);
  const Index stride = (inputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* across = scratch<T, 0>(outputs * stride);
  pack_transposed(weights, outputs, outputs, inputs, stride, across);
  const Index size = (stride + 1) * outputs;
  T* sums = scratch<T, 1>(parts * size);
  parallel(pool, parts, [&](Index part) {
    T* sum = sums + part * size;
    std::fill_n(sum, size, T(0));
    constexpr Index kRows = 4;
    const Index first = share(batch, kRows, part, parts);
    const Index last = share(batch, kRows, part + 1, parts);
    add_rows(d + first * outputs, last - first, outputs, outputs, sum + outputs * stride);
    for (Index i = first; i < last;) {
      const Index rows = last - i < kRows ? 1 : kRows;
      for (Index n = 0; n < outputs; n += kFewOutputs) {
        with_few(std::min(kFewOutputs, outputs - n), [&](auto count) {
          const auto add = rows == 1 ? few_gradients<T, count, 1> : few_gradients<T, count, kRows>;
          add(x + i * inputs, inputs, d + i * outputs + n, outputs, across + n * stride, stride,
              n > 0, dx + i * inputs, sum + n * stride);
        });
      }
      i += rows;
    }
  });
  const auto total = [&](Index at) {
    T result = 0;
    for (Index part = 0; part < parts; ++part) result += sums[part * size + at];
    return result;
  };
  for (Index n = 0; n < outputs; ++n) {
    for (Index k = 0; k < inputs; ++k) d_weights[k * outputs + n] = total(n * stride + k);
    d_bias[n] = total(outputs * stride + n);
  }
}

template <typename T>
void perceptron_gradient(ffi::ThreadPool& pool, const Layers& shape, const T* x, const T* w1,
                         const T* b1, const T* w2, const T* d_result, T* d_w1, T* d_b1, T* d_w2,
                         T* d_b2) {
  const Index inputs = shape.inputs, hidden = shape.hidden, outputs = shape.outputs;
  const T* weights = panels_of<T, 0>(w1, inputs, hidden, false, lanes_of<T>(hidden));
  const T* back = panels_of<T, 1>(w2, outputs, hidden, true, lanes_of<T>(hidden));
  const Index sizes[] = {inputs * hidden, hidden, hidden * outputs, outputs};
  const Index size = sizes[0] + sizes[1] + sizes[2] + sizes[3];
  std::unique_ptr<T[]> sums(new T[shape.parts * size]);
  const Index each = shape.blocks / shape.parts;
  parallel(pool, shape.parts, [&](Index part) {
    T* sum = sums.get() + part * size;
    std::fill_n(sum, size, T(0));
    const Index stride = Shape::stride<T>(hidden);
    const Index d_stride = (outputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (Index i = part * each; i < (part + 1) * each; ++i) {
      const Index first = shape.begin(i), rows = shape.begin(i + 1) - first;
      T* activations = scratch<T, 2>(rows * stride);
      T* d_hidden = scratch<T, 3>(rows * stride + kWidest * kLanes<T>);
      std::fill_n(d_hidden, rows * stride + kWidest * kLanes<T>, T(0));
      const auto x_row = [&](Index m) { return x + (first + m) * inputs; };
      times<T>(weights, inputs, hidden, rows, x_row, [&](Index) { return b1; },
               [&](Index m) { return activations + m * stride; });
      if (outputs) {
        times<T>(back, outputs, hidden, rows,
                 [&](Index m) { return d_result + (first + m) * outputs; }, nothing<T>,
                 [&](Index m) { return d_hidden + m * stride; });
      }
      for (Index m = 0; m < rows; ++m) {
        const T* given = outputs ? d_hidden + m * stride : d_result + (first + m) * hidden;
        T* row = activations + m * stride;
        in_groups<T>(hidden, [&](auto size, Index j, Index left) {
          constexpr int N = size;
          Group<T, N> z, density, slope;
          load_group<T, N>(row + j, left, z);
          normal<T, N>(z, density, slope);
          EACH density[i] = z[i] * (density[i] * T(0.39894228040143267794)) + slope[i];
          EACH z[i] *= slope[i];
          store_group<T, N>(row + j, left, z);
          load_group<T, N>(given + j, left, z);
          EACH density[i] *= z[i];
          store_group<T, N>(d_hidden + m * stride + j, left, density);
        });
      }
      add_rows(d_hidden, rows, stride, hidden, sum + sizes[0]);
      with_width(panel_width<T>(hidden), [&](auto width) {
        constexpr Index lanes = width * kLanes<T>;
        for (Index p = 0; p < hidden; p += lanes) {
          const Product<T> product{1, 0, rows, inputs, d_hidden + p, stride};
          const auto to = [&](Index m) { return sum + m * hidden + p; };
          multiply<T, width>(
              product, inputs, hidden - p, [&](Index m) { return x_row(0) + m; }, to, to);
        }
      });
      if (outputs == 0) continue;
      add_rows(d_result + first * outputs, rows, outputs, outputs, sum + size - sizes[3]);
      T* d_rows = scratch<T, 4>(rows * d_stride + kWidest * kLanes<T>);
      pack(d_result + first * outputs, outputs, rows, outputs, d_stride, d_rows);
      with_width(panel_width<T>(outputs), [&](auto width) {
        constexpr Index lanes = width * kLanes<T>;
        for (Index p = 0; p < outputs; p += lanes) {
          const Product<T> product{1, 0, rows, stride, d_rows + p, d_stride};
          const auto to = [&](Index m) { return sum + sizes[0] + sizes[1] + m * outputs + p; };
          multiply<T, width>(
              product, hidden, outputs - p, [&](Index m) { return activations + m; }, to, to);
        }
      });
    }
  });
  T* const results[] = {d_w1, d_b1, d_w2, d_b2};
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

ffi::Error Linear(ffi::ThreadPool pool, In x, ffi::RemainingArgs layers,
                  ffi::RemainingRets results) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Index batch = x.dimensions()[0], inputs = x.dimensions()[1];
    const Heads<T> heads(inputs, layers, results);
    const Index blocks = (batch + kBlock - 1) / kBlock;
    const bool large = batch * inputs * heads.outputs() / 8 > kWorthwhile;
    parallel(pool, blocks, [&](Index i) {
      const Index first = share(batch, 2, i, blocks);
      const Index rows = share(batch, 2, i + 1, blocks) - first;
      heads(first, rows, in<T>(x) + first * inputs, inputs);
    }, large);
  });
}

ffi::Error LinearGradient(ffi::ThreadPool pool, In x, In weights, In d_result, Out dx,
                          Out d_weights, Out d_bias) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    linear_gradient<T>(pool, x.dimensions()[0], x.dimensions()[1], d_result.dimensions()[1],
                       in<T>(x), in<T>(weights), in<T>(d_result), out<T>(dx), out<T>(d_weights),
                       out<T>(d_bias));
  });
}

ffi::Error PerceptronGradient(ffi::ThreadPool pool, In x, In w1, In b1, In w2, In d_result,
                              Out d_w1, Out d_b1, Out d_w2, Out d_b2) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Layers shape(x, w1.dimensions()[1], w2.dimensions()[1], pool);
    perceptron_gradient<T>(pool, shape, in<T>(x), in<T>(w1), in<T>(b1), in<T>(w2),
                           in<T>(d_result), out<T>(d_w1), out<T>(d_b1), out<T>(d_w2),
                           out<T>(d_b2));
  });
}

// --- convolution -----------------------------------------------------------------------------

// Images (batch, height, width, channels) and windows over them. The images of bytes that an
// environment gives, and a result, may have their channels first; all else has them last.
struct Images {
  Index batch, height, width, channels;
  explicit Images(ffi::AnyBuffer::Dimensions d, bool first = false)
      : batch(d[0]), height(d[first ? 2 : 1]), width(d[first ? 3 : 2]), channels(d[first ? 1 : 3]) {}
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

// An image within borders of zeros, its negative numbers zero, too, if it is to be rectified; what
// lies beyond `sides` is cut off.
template <typename T>
void place(const T* image, Pair image_sides, Index channels, Pair corner, Pair sides, bool rectify,
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

// The image that the windows slide over: itself if it needs no border, unless somebody means to
// read some numbers beyond its end.
template <typename T>
const T* bordered(const Windows& w, const Numbers<T>& x, Index n, Index beyond = 0) {
  const T* image = x.data + n * w.x.size();
  if (!x.rectify && beyond == 0 && w.pad.rows == 0 && w.pad.columns == 0 &&
      w.sides.columns == w.x.width) {
    return image;
  }
  T* copy = scratch<T, 1>(w.sides.rows * w.sides.columns * w.x.channels + beyond);
  place(image, {w.x.height, w.x.width}, w.x.channels, w.pad, w.sides, x.rectify, copy);
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
      // Zipping with zeros makes bytes wider; compilers convert them to wider ones one by one.
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
const T* bordered(const Windows& w, const Bytes& x, Index n, Index beyond = 0) {
  const Index channels = w.x.channels;
  T* copy = scratch<T, 1>(w.sides.rows * w.sides.columns * channels + beyond);
  if (w.pad.rows || w.pad.columns) {
    std::fill_n(copy, w.sides.rows * w.sides.columns * channels, T(0));
  }
  const Index rows = std::min(w.sides.rows - w.pad.rows, w.x.height);
  const Index columns = std::min(w.sides.columns - w.pad.columns, w.x.width);
  std::uint8_t* joined = scratch<std::uint8_t, 1>(columns * channels);
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

// With `across`, the result's channels come first.
template <typename T, typename X>
void convolve(ffi::ThreadPool& pool, const Windows& w, const X& x, const T* kernel, const T* bias,
              bool across, T* out) {
  const Index outputs = w.out.channels, numbers = w.numbers();
  with_width(panel_width<T>(outputs), [&](auto width) {
    constexpr Index lanes = width * kLanes<T>;
    const Index panels = (outputs + lanes - 1) / lanes;
    T* packed = scratch<T, 0>(panels * numbers * lanes);
    for (Index p = 0; p < panels; ++p) {
      pack(kernel + p * lanes, outputs, numbers, std::min(lanes, outputs - p * lanes), lanes,
           packed + p * numbers * lanes);
    }
    const Index row = w.sides.columns * w.x.channels, pixels = w.out.height * w.out.width;
    Index* starts = scratch<Index, 2>(pixels);
    for (Index i = 0; i < pixels; ++i) {
      starts[i] = i / w.out.width * w.stride.rows * row +
                  i % w.out.width * w.stride.columns * w.x.channels;
    }
    parallel(pool, w.x.batch, [&](Index n) {
      const T* image = bordered<T>(w, x, n);
      T* result = out + n * w.out.size();
      T* pixels_first = across ? scratch<T, 3>(w.out.size()) : result;
      for (Index p = 0; p < panels; ++p) {
        T* to = pixels_first + p * lanes;
        multiply<T, width>(
            {w.size.rows, row, w.size.columns * w.x.channels, 1, packed + p * numbers * lanes,
             lanes},
            pixels, outputs - p * lanes, [&](Index i) { return image + starts[i]; },
            [&](Index) { return bias + p * lanes; }, [&](Index i) { return to + i * outputs; });
      }
      if (across) transpose(pixels_first, outputs, pixels, outputs, result, pixels);
    });
  });
}

// The pixels that one number of the windows meets are `stride` apart, so each of the stride's
// phases is a convolution of d_out with every stride-th number of the reversed windows. With images
// `x`, a ReLU came first.
template <typename T>
void convolve_images_gradient(ffi::ThreadPool& pool, const Windows& w, const T* x, const T* kernel,
                              const T* d_out, T* dx) {
  const Index outputs = w.out.channels, channels = w.x.channels;
  const auto taps = [](Index size, Index stride, Index phase) {
    return phase < size ? (size - phase + stride - 1) / stride : 0;
  };
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
    T* packed = scratch<T, 0>(phases * panels * panel_size);
    for (Index phase = 0; phase < phases; ++phase) {
      const Pair at{phase / w.stride.columns, phase % w.stride.columns};
      const Pair count{taps(w.size.rows, w.stride.rows, at.rows),
                       taps(w.size.columns, w.stride.columns, at.columns)};
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
      T* image = scratch<T, 1>(sides.rows * row);
      place(d_out + n * w.out.size(), {w.out.height, w.out.width}, outputs, corner, sides, false,
            image);
      for (Index phase = 0; phase < phases; ++phase) {
        const Pair at{phase / w.stride.columns, phase % w.stride.columns};
        const Pair count{taps(w.size.rows, w.stride.rows, at.rows),
                         taps(w.size.columns, w.stride.columns, at.columns)};
        // The pixels (y, x) of this phase: y + pad = stride * q + phase.
        const Pair q{(std::max<Index>(0, w.pad.rows - at.rows) + w.stride.rows - 1) / w.stride.rows,
                     (std::max<Index>(0, w.pad.columns - at.columns) + w.stride.columns - 1) /
                         w.stride.columns};
        const Pair first{q.rows * w.stride.rows + at.rows - w.pad.rows,
                         q.columns * w.stride.columns + at.columns - w.pad.columns};
        const Pair pixels{(w.x.height - first.rows + w.stride.rows - 1) / w.stride.rows,
                          (w.x.width - first.columns + w.stride.columns - 1) / w.stride.columns};
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
              nothing<T>,
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
        const T* image = bordered<T>(w, x, n, length % lanes ? lanes : 0);
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

template <typename T, typename Body>
void with_images(const In& x, bool channels_first, bool rectify, const Body& body) {
  if (x.element_type() == ffi::DataType::U8) {
    body(Bytes{in<std::uint8_t>(x), channels_first});
  } else {
    body(Numbers<T>{in<T>(x), rectify});
  }
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
      convolve<T>(pool, windows, images, in<T>(kernel), in<T>(bias), out_channels_first,
                  out<T>(result));
    });
  });
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

// --- pooling ---------------------------------------------------------------------------------

// The largest number of windows of 3x3, 2 apart, borders of 1; `taken`, if any, tells which of the
// nine it was, the first of equal ones. NaN is larger than any number.
template <typename T>
void max_pool(ffi::ThreadPool& pool, const Images& x, const Images& out, const T* data, T* result,
              std::int8_t* taken) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Bits Integers __attribute__((vector_size(kBytes)));
  typedef std::int8_t Small __attribute__((vector_size(kLanes<T>), aligned(1), may_alias));
  const Index channels = x.channels;
  parallel(pool, x.batch, [&](Index n) {
    for (Index i = 0; i < out.height; ++i) {
      // Rows and columns of the window from its last to its first.
      const Index top = i ? 0 : 1, bottom = std::min<Index>(2, x.height - 2 * i);
      for (Index j = 0; j < out.width; ++j) {
        const Index left = j ? 0 : 1, right = std::min<Index>(2, x.width - 2 * j);
        const T* corner = data + n * x.size() + ((2 * i - 1) * x.width + 2 * j - 1) * channels;
        const Index at = n * out.size() + (i * out.width + j) * channels;
        for (Index c = 0; c < channels; c += kLanes<T>) {
          const Index count = std::min(channels - c, kLanes<T>);
          Vector<T> best = Vector<T>{} - std::numeric_limits<T>::infinity();
          Integers which = {};
          for (Index row = bottom; row >= top; --row) {
            for (Index column = right; column >= left; --column) {
              const T* from = corner + (row * x.width + column) * channels + c;
              const Vector<T> value = load(from, count);
              const auto more = (value >= best) | (value != value);
              best = more ? value : best;
              which = more ? Integers{} + Bits(3 * row + column) : which;
            }
          }
          store(result + at + c, best, count);
          if (taken == nullptr) continue;
          if (count == kLanes<T>) {
            *reinterpret_cast<Small*>(taken + at + c) = __builtin_convertvector(which, Small);
          } else {
            for (Index k = 0; k < count; ++k) taken[at + c + k] = which[k];
          }
        }
      }
    }
  });
}

template <typename T>
void max_pool_gradient(ffi::ThreadPool& pool, const Images& x, const Images& out,
                       const std::int8_t* taken, const T* d_out, T* dx) {
  const Index channels = x.channels;
  parallel(pool, x.batch, [&](Index n) {
    T* image = dx + n * x.size();
    std::fill_n(image, x.size(), T(0));
    for (Index i = 0; i < out.height; ++i) {
      for (Index j = 0; j < out.width; ++j) {
        T* corner = image + ((2 * i - 1) * x.width + 2 * j - 1) * channels;
        const Index at = n * out.size() + (i * out.width + j) * channels;
        for (Index c = 0; c < channels; ++c) {
          const int tap = taken[at + c];
          corner[(tap / 3 * x.width + tap % 3) * channels + c] += d_out[at + c];
        }
      }
    }
  });
}

ffi::Error MaxPool(ffi::ThreadPool pool, In x, Out result, Out taken) {
  const Images images(x.dimensions()), pooled(result->dimensions());
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    std::int8_t* where = taken->element_count() ? out<std::int8_t>(taken) : nullptr;
    max_pool<T>(pool, images, pooled, in<T>(x), out<T>(result), where);
  });
}

ffi::Error MaxPoolGradient(ffi::ThreadPool pool, In taken, In d_out, Out dx) {
  const Images images(dx->dimensions()), pooled(d_out.dimensions());
  return with_type(d_out.element_type(), [&](auto zero) {
    using T = decltype(zero);
    max_pool_gradient<T>(pool, images, pooled, in<std::int8_t>(taken), in<T>(d_out), out<T>(dx));
  });
}

// --- Adam ------------------------------------------------------------------------------------

struct AdamNumbers {
  enum : Index { scale, decay1, new1, decay2, new2, rate, inverse_root, eps, skip, count };
};

// One pass over what XLA goes through three times, and copies.
template <typename T>
void adam(ffi::ThreadPool& pool, Index size, const T* numbers, const T* gradient, T* params,
          T* first, T* second) {
  using Is = AdamNumbers;
  if (numbers[Is::skip] != 0) return;
  constexpr Index lanes = kLanes<T>;
  const Index parts = size * 4 > kWorthwhile ? std::max<Index>(1, pool.num_threads()) : 1;
  parallel(pool, parts, [&](Index part) {
    const Index end = share(size, lanes, part + 1, parts);
    for (Index i = share(size, lanes, part, parts); i < end; i += lanes) {
      const Index count = std::min(end - i, lanes);
      const Vector<T> g = load(gradient + i, count) * numbers[Is::scale];
      const Vector<T> m = load(first + i, count) * numbers[Is::decay1] + g * numbers[Is::new1];
      const Vector<T> v = load(second + i, count) * numbers[Is::decay2] + g * g * numbers[Is::new2];
      Vector<T> deviation;
      for (Index k = 0; k < lanes; ++k) deviation[k] = std::sqrt(v[k]);
      const Vector<T> step =
          m * numbers[Is::rate] / (deviation * numbers[Is::inverse_root] + numbers[Is::eps]);
      store(params + i, load(params + i, count) + step, count);
      store(first + i, m, count);
      store(second + i, v, count);
    }
  });
}

// The results are the parameters and the moments themselves.
ffi::Error Adam(ffi::ThreadPool pool, In numbers, In gradient, In, In, In, Out params, Out first,
                Out second) {
  // Each with its numbers: `vmap` puts several into one call.
  const Index several = numbers.element_count() / AdamNumbers::count;
  const Index size = gradient.element_count() / several;
  return with_type(gradient.element_type(), [&](auto zero) {
    using T = decltype(zero);
    for (Index i = 0; i < several; ++i) {
      const Index at = i * size;
      adam<T>(pool, size, in<T>(numbers) + i * AdamNumbers::count, in<T>(gradient) + at,
              out<T>(params) + at, out<T>(first) + at, out<T>(second) + at);
    }
  });
}

}  // namespace

#define ARG .Arg<In>()
#define RET .Ret<ffi::AnyBuffer>()
#define WINDOWS                                                                  \
  .Attr<bool>("channels_first").Attr<bool>("rectify")                            \
      .Attr<std::int64_t>("stride_rows").Attr<std::int64_t>("stride_columns")    \
      .Attr<std::int64_t>("pad_rows").Attr<std::int64_t>("pad_columns")

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve, Convolve,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG RET WINDOWS
                              .Attr<bool>("out_channels_first"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve_images_gradient, ConvolveImagesGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG RET WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_convolve_weights_gradient, ConvolveWeightsGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET RET WINDOWS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_max_pool, MaxPool,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_max_pool_gradient, MaxPoolGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_perceptron, Perceptron,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG.RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_linear, Linear,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG.RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_linear_gradient, LinearGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG RET RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_perceptron_gradient, PerceptronGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG RET RET RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_forward, LstmForward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG RET RET RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_step, LstmStep,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_lstm_backward, LstmBackward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG ARG RET RET RET RET RET
                              RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_recur, Recur,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_adam, Adam,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                              ARG ARG ARG ARG ARG RET RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_threefry, Threefry,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_categorical, Categorical,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_sample, Sample,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG RET RET RET
                              .Attr<std::int64_t>("component"));
