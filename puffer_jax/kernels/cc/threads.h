// Tasks, for the caller and for threads of XLA's pool that help.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Other threads wake up too late to help with less work than this, in cycles of one core.
constexpr Index kWorthwhile = 1 << 17;
// Between kernels no longer than this, threads stay awake; what is shorter is within a kernel.
constexpr std::chrono::microseconds kAwake(1000), kWithin(50);

// A kernel's tasks; whichever thread is free takes the next one.
struct Job {
  void (*body)(const void*, Index);
  const void* self;
  Index tasks;
  std::atomic<Index> next{0}, finished{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first task that failed, to be read when all have finished

  // Without it `make_shared` would need C++20's aggregates in parentheses, which Clang has from 16.
  Job(void (*body)(const void*, Index), const void* self, Index tasks)
      : body(body), self(self), tasks(tasks) {}

  void work() {
    for (Index i; (i = next.fetch_add(1)) < tasks;) {
      // An exception would end a thread of XLA's pool, or the caller while others are at work.
      try {
        if (!failed.load()) body(self, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
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

// Stays awake until `ready()`, but only for a moment, and gives way to other threads.
template <typename Ready>
bool awake_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::yield();
    // Two virtual cores may be one: what the other can do is worth more than how often we ask.
    for (int i = 0; i < 16 && !ready(); ++i) pause();
  }
  return true;
}

// Threads of XLA's pool that help. A core that sleeps can take longer to wake than a kernel runs.
// So if kernels have followed each other closely, a helper stays awake for the next one;
// otherwise XLA needs the thread for its own operations.
class Helpers {
 public:
  // Asks for `count` of them; those that come too late find nothing left to do.
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
    try {
      for (Index i = 0; i < count; ++i) pool.Schedule([this, job, number] { help(job, number); });
    } catch (const std::bad_alloc&) {
      // Some may have begun, so the job goes on, with fewer of them.
    }
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

// Never destroyed, since threads may still use it.
Helpers& helpers() {
  static Helpers& all = *new Helpers;
  return all;
}

// Runs body(0) ... body(tasks - 1), some of them in XLA's pool. The caller works, too, and waits
// only for what has begun, so a pool that is busy with other work cannot deadlock it. What a task
// throws, the caller throws once none is at work any more; tasks that have not begun are dropped.
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
  if (!awake_until(done)) {
    for (Index n; (n = job->finished.load()) < tasks;) job->finished.wait(n);
  }
  if (job->failed.load()) std::rethrow_exception(job->error);
}

// Where task `i` of `tasks` begins when `size` items are dealt out in whole groups.
inline Index share(Index size, Index group, Index i, Index tasks) {
  const Index groups = (size + group - 1) / group;
  return std::min(size, groups * i / tasks * group);
}

}  // namespace
