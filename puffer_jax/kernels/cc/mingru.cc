// A layer of the MinGRU over time and its gradient: gates, recurrence and highway in one pass.

#include <algorithm>

#include "ffi.h"
#include "threads.h"
#include "vectors.h"

namespace {

// The sigmoids of x and of -x, each to its own last digits.
template <typename T, int N>
INLINE void sigmoids(const Group<T, N>& x, Group<T, N>& open, Group<T, N>& closed) {
  Group<T, N> power, rest;
  EACH open[i] = at_least<T>(x[i] < 0 ? x[i] : -x[i], -kSteepest<T>);
  split_exponential<T, N>(open, power, rest);
  EACH rest[i] = power[i] * rest[i] + power[i];
  EACH power[i] = rest[i] + 1;
  reciprocal<T, N>(power);
  EACH rest[i] = rest[i] * power[i];
  EACH open[i] = x[i] < 0 ? rest[i] : power[i];
  EACH closed[i] = x[i] < 0 ? power[i] : rest[i];
}

// What may enter the state: u + 0.5 where u >= 0, else sigmoid(u); and its slope.
template <typename T, int N>
INLINE void candidates(const Group<T, N>& u, Group<T, N>& candidate, Group<T, N>& slope) {
  Group<T, N> low, closed;
  EACH low[i] = at_most<T>(u[i], 0);
  sigmoids<T, N>(low, candidate, closed);
  EACH slope[i] = u[i] >= 0 ? T(1) + Vector<T>{} : candidate[i] * closed[i];
  EACH candidate[i] = u[i] >= 0 ? u[i] + T(0.5) : candidate[i];
}

struct MinGru {
  Index time, batch, hidden;

  explicit MinGru(const In& x)
      : time(x.dimensions()[0]), batch(x.dimensions()[1]), hidden(x.dimensions()[2]) {}

  // body(first, last) for blocks of the batch whose states stay in the nearest cache.
  template <typename Body>
  void blocks(ffi::ThreadPool& pool, const Body& body) const {
    const Index rows = std::max(Index(1), 2048 / hidden);
    const Index tasks = (batch + rows - 1) / rows;
    const auto task = [&](Index i) { body(i * rows, std::min(batch, (i + 1) * rows)); };
    // Three exponentials and what goes with them are some twenty cycles a number.
    parallel(pool, tasks, task, time * batch * hidden * 20 > kWorthwhile);
  }
};

template <typename T>
struct MinGruArguments {
  const T *x, *projected, *h;
  const bool* starts;  // null: none
};

// y and the state after the last step; every state, too, if there is room for them.
template <typename T>
void mingru_forward(ffi::ThreadPool& pool, const MinGru& shape, const MinGruArguments<T>& args,
                    T* y, T* last, T* states) {
  const Index width = shape.hidden;
  shape.blocks(pool, [&](Index first, Index end) {
    for (Index t = 0; t < shape.time; ++t) {
      for (Index row = first; row < end; ++row) {
        const Index at = t * shape.batch + row;
        const bool starts = args.starts != nullptr && args.starts[at];
        const T* gates = args.projected + 3 * at * width;
        const T* before = (t == 0 ? args.h : last) + row * width;
        in_groups<T>(width, [&](auto size, Index k, Index left) {
          constexpr int N = decltype(size)::value;
          Group<T, N> x, state, open, closed;
          load_group<T, N>(gates + k, left, x);
          candidates<T, N>(x, state, closed);  // there is no use for the slope
          load_group<T, N>(gates + width + k, left, x);
          sigmoids<T, N>(x, open, closed);
          EACH state[i] *= open[i];
          if (!starts) {
            load_group<T, N>(before + k, left, x);
            EACH state[i] += closed[i] * x[i];
          }
          store_group<T, N>(last + row * width + k, left, state);
          if (states != nullptr) store_group<T, N>(states + at * width + k, left, state);
          load_group<T, N>(gates + 2 * width + k, left, x);
          sigmoids<T, N>(x, open, closed);
          load_group<T, N>(args.x + at * width + k, left, x);
          EACH x[i] = open[i] * state[i] + closed[i] * x[i];
          store_group<T, N>(y + at * width + k, left, x);
        });
      }
    }
  });
}

template <typename T>
struct MinGruGradients {
  T *x, *projected, *h;
};

// Gates are computed anew. What reaches the state before a step is carried in the gradient of h.
template <typename T>
void mingru_backward(ffi::ThreadPool& pool, const MinGru& shape, const MinGruArguments<T>& args,
                     const T* states, const T* d_y, const T* d_last,
                     const MinGruGradients<T>& gradients) {
  const Index width = shape.hidden;
  shape.blocks(pool, [&](Index first, Index end) {
    for (Index t = shape.time - 1; t >= 0; --t) {
      for (Index row = first; row < end; ++row) {
        const Index at = t * shape.batch + row;
        const bool starts = args.starts != nullptr && args.starts[at];
        const T* gates = args.projected + 3 * at * width;
        T* d_gates = gradients.projected + 3 * at * width;
        const T* before = (t == 0 ? args.h : states + (t - 1) * shape.batch * width) + row * width;
        const T* after = (t == shape.time - 1 ? d_last : gradients.h) + row * width;
        in_groups<T>(width, [&](auto size, Index k, Index left) {
          constexpr int N = decltype(size)::value;
          Group<T, N> x, open, closed, state, d, d_state;
          load_group<T, N>(gates + 2 * width + k, left, x);
          sigmoids<T, N>(x, open, closed);
          load_group<T, N>(d_y + at * width + k, left, d);
          load_group<T, N>(states + at * width + k, left, state);
          load_group<T, N>(args.x + at * width + k, left, x);
          load_group<T, N>(after + k, left, d_state);
          EACH d_state[i] += d[i] * open[i];
          EACH d[i] *= closed[i];
          store_group<T, N>(gradients.x + at * width + k, left, d);
          EACH d[i] *= open[i] * (state[i] - x[i]);
          store_group<T, N>(d_gates + 2 * width + k, left, d);

          load_group<T, N>(gates + k, left, x);
          candidates<T, N>(x, state, d);
          load_group<T, N>(gates + width + k, left, x);
          sigmoids<T, N>(x, open, closed);
          EACH d[i] *= open[i] * d_state[i];
          store_group<T, N>(d_gates + k, left, d);
          EACH d[i] = closed[i] * d_state[i];
          if (!starts) {
            load_group<T, N>(before + k, left, x);
            EACH state[i] -= x[i];
          }
          EACH state[i] *= d[i] * open[i];
          store_group<T, N>(d_gates + width + k, left, state);
          if (starts) EACH d[i] = Vector<T>{};
          store_group<T, N>(gradients.h + row * width + k, left, d);
        });
      }
    }
  });
}

const bool* starts_in(const In& starts) {
  return starts.element_count() ? in<bool>(starts) : nullptr;
}

ffi::Error MinGruForward(ffi::ThreadPool pool, In x, In projected, In h, In starts, Out y, Out last,
                         Out states) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const MinGruArguments<T> args{in<T>(x), in<T>(projected), in<T>(h), starts_in(starts)};
    T* kept = states->element_count() ? out<T>(states) : nullptr;
    mingru_forward<T>(pool, MinGru(x), args, out<T>(y), out<T>(last), kept);
  });
}

ffi::Error MinGruBackward(ffi::ThreadPool pool, In x, In projected, In h, In starts, In states,
                          In d_y, In d_last, Out dx, Out d_projected, Out dh) {
  return with_type(x.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const MinGruArguments<T> args{in<T>(x), in<T>(projected), in<T>(h), starts_in(starts)};
    mingru_backward<T>(pool, MinGru(x), args, in<T>(states), in<T>(d_y), in<T>(d_last),
                       {out<T>(dx), out<T>(d_projected), out<T>(dh)});
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_mingru_forward, MinGruForward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG ARG RET RET RET);
XLA_FFI_DEFINE_HANDLER_SYMBOL(puffer_jax_mingru_backward, MinGruBackward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>() ARG ARG ARG ARG ARG ARG ARG
                              RET RET RET);
