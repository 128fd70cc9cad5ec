// Memory that threads keep, and large pages.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace {

// What a thread keeps memory for. Two blocks that a thread uses at once differ in this or in their
// type; operations, which never run within one another, share them, so that less is kept.
enum class Slot {
  kPanels,           // a layer's weights, packed for all tasks
  kMorePanels,       // those of a second layer
  kBias,             // the sum of two
  kJoined,           // weights and biases of several layers, side by side
  kHeads,            // the layers themselves
  kNever,            // no episode begins
  kPlaces,           // where rows lie
  kRows,             // what a task reads: a copy of sequences or of an image
  kPixels,           // a row of an image of bytes
  kResults,          // what a task makes of it, for its next step
  kHeadResults,      // of several layers, side by side
  kTanh,             // of cells
  kGradients,        // of what a task made
  kResultGradients,  // given to a task, copied
  kSums,             // gradients of weights, of each part of the batch
  kNormalised,       // logits
  kPowers,           // their exponentials
  kLogs,             // of the exponentials' sums
  kScores,           // logits with noise
};

constexpr std::align_val_t kAligned{kBytes};

// Memory for one purpose, kept by the thread: fresh pages cost as much as the arithmetic on them.
// It is followed by room for one more panel: a product reads whole panels, though the last row of a
// matrix that is used as one may end within it, and ignores what comes of the rest.
template <typename T, Slot slot>
T* scratch(Index size) {
  struct Memory {
    T* data = nullptr;
    Index size = 0;
    ~Memory() { ::operator delete(data, kAligned); }
  };
  thread_local Memory memory;
  if (memory.size < size) {
    memory.size = 0;  // and stays so if there is no memory
    ::operator delete(std::exchange(memory.data, nullptr), kAligned);
    const std::size_t bytes = (size * sizeof(T) + kBytes - 1) / kBytes * kBytes + kWidest * kBytes;
    memory.data = static_cast<T*>(::operator new(bytes, kAligned));
    memory.size = size;
  }
  return memory.data;
}

// Asks for large pages for a result that is about to be written. XLA's buffers are fresh memory in
// every call, and touching it first, page by page, can cost more than the arithmetic.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 1 << 12, large = 1 << 21;
  if (bytes < 2 * large) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
