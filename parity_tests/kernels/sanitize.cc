// Calls the kernels of a library as XLA does, at shapes drawn from a seed, with nothing readable
// beyond the arrays and the kernels' own memory. Nothing is compared but memory; see sanitize.py.
//
//   driver LIBRARY float|double MODE SHAPES SEED KERNEL...
//
// Modes: "plain" for libraries built with sanitizers; "end" has a forbidden page right behind every
// block of memory, "begin" right before it; "starve" fails each allocation in turn, after which the
// same call must do its work. "write=FILE" writes all results there, one after another: of each its
// type and the number of its elements, in 64 bits, then the elements.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

using Index = std::int64_t;
using Dims = std::vector<Index>;

// --- memory --------------------------------------------------------------------------------

enum class Mode { kPlain, kEnd, kBegin, kStarve };
Mode mode = Mode::kPlain;
std::FILE* written = nullptr;
std::atomic<int> until_failure{-1};  // allocations of the kernel that succeed before one does not
thread_local bool in_kernel = false;

const std::uintptr_t kPage = sysconf(_SC_PAGESIZE);
constexpr std::uintptr_t kArena = std::uintptr_t(1) << 40;
char* arena = nullptr;
std::atomic<std::uintptr_t> arena_used{0};

void check(bool fine, const char* what) {
  if (fine) return;
  std::printf("FAILED: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

void forbid(void* from, std::uintptr_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (from ? MAP_FIXED : 0);
  void* got = mmap(from, bytes, PROT_NONE, flags, -1, 0);
  check(got != MAP_FAILED, "mmap");
  if (from == nullptr) arena = static_cast<char*>(got);
}

// A page that keeps the size, a forbidden one, the block, and another forbidden one. No address is
// ever given out twice.
void* guarded(std::uintptr_t bytes, std::uintptr_t alignment) {
  const std::uintptr_t room = std::max<std::uintptr_t>(1, (bytes + kPage - 1) / kPage) * kPage;
  const std::uintptr_t at = arena_used.fetch_add(room + 3 * kPage);
  check(at + room + 3 * kPage <= kArena, "the arena is used up");
  char *size = arena + at, *data = size + 2 * kPage;
  check(mprotect(size, kPage, PROT_READ | PROT_WRITE) == 0, "mprotect");
  check(mprotect(data, room, PROT_READ | PROT_WRITE) == 0, "mprotect");
  *reinterpret_cast<std::uintptr_t*>(size) = room;
  std::memset(data, 0xff, room);  // NaN, so that what is read before it is written shows
  if (mode == Mode::kBegin) return data;
  return data + (room - std::max<std::uintptr_t>(1, bytes)) / alignment * alignment;
}

void* allocate(std::uintptr_t bytes, std::uintptr_t alignment) {
  if (in_kernel && until_failure.load() >= 0 && until_failure.fetch_sub(1) == 0) return nullptr;
  if (in_kernel && arena != nullptr) return guarded(bytes, alignment);
  void* result = nullptr;
  return posix_memalign(&result, std::max(alignment, sizeof(void*)), bytes) ? nullptr : result;
}

void release(void* block) {
  char* at = static_cast<char*>(block);
  if (arena == nullptr || at < arena || at >= arena + kArena) return std::free(block);
  char* size = arena + (at - arena) / kPage * kPage - 2 * kPage;
  forbid(size, *reinterpret_cast<std::uintptr_t*>(size) + 2 * kPage);
}

void* given(void* block) {
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

void* operator new(std::size_t n) { return given(allocate(n, 16)); }
void* operator new[](std::size_t n) { return given(allocate(n, 16)); }
void* operator new(std::size_t n, std::align_val_t a) { return given(allocate(n, std::size_t(a))); }
void* operator new[](std::size_t n, std::align_val_t a) { return operator new(n, a); }
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { release(p); }

// Whether what is allocated is the kernel's, for as long as this lives.
struct Kernels {
  bool before = in_kernel;
  explicit Kernels(bool now) { in_kernel = now; }
  ~Kernels() { in_kernel = before; }
};

// --- arrays and calls ----------------------------------------------------------------------

XLA_FFI_DataType number;  // the library's

Index size_of(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_F64: return 8;
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_U8:
    case XLA_FFI_DataType_S8: return 1;
    default: return 4;
  }
}

// An array that ends where its memory does.
struct Array {
  XLA_FFI_DataType type;
  Dims dims;
  int in_place_of = -1;  // of a result: the argument that it is written over
  int value = -1;        // of all its elements; random ones if negative
  char* data = nullptr;

  Index count() const {
    Index result = 1;
    for (const Index n : dims) result *= n;
    return result;
  }
  Index bytes() const { return count() * size_of(type); }
};

struct Attribute {
  std::string name;
  Index value;
  bool truth = false;  // or an integer
};

struct Call {
  std::string name;
  std::vector<Array> args, results;
  std::vector<Attribute> attributes = {};  // sorted by name
  Index threads = 1;
};

using Random = std::mt19937_64;

Index below(Random& random, Index n) { return Index(random() % std::uint64_t(n)); }

void fill(Random& random, Array& array) {
  const Index n = array.count();
  for (Index i = 0; i < n; ++i) {
    const double x = array.value < 0 ? double(below(random, 2001) - 1000) / 500 : array.value;
    switch (array.type) {
      case XLA_FFI_DataType_F64: reinterpret_cast<double*>(array.data)[i] = x; break;
      case XLA_FFI_DataType_F32: reinterpret_cast<float*>(array.data)[i] = float(x); break;
      case XLA_FFI_DataType_U32:
        reinterpret_cast<std::uint32_t*>(array.data)[i] = std::uint32_t(random());
        break;
      case XLA_FFI_DataType_PRED: array.data[i] = random() % 8 == 0; break;
      default: array.data[i] = array.value < 0 ? char(random()) : char(array.value);
    }
  }
}

struct XLA_FFI_Error {
  std::string message;
};

// XLA's pool, as far as kernels use it: every task gets a thread, all are waited for.
struct XLA_FFI_ExecutionContext {
  Index size;
  std::mutex mutex;
  std::vector<std::thread> threads;

  void wait() {
    for (std::size_t i = 0;; ++i) {
      std::thread next;
      {
        const std::lock_guard lock(mutex);
        if (i == threads.size()) return;
        next = std::move(threads[i]);
      }
      next.join();
    }
  }
};

XLA_FFI_Error* error_create(XLA_FFI_Error_Create_Args* args) {
  const Kernels not_its(false);
  const bool memory = args->errc == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
  return new XLA_FFI_Error{memory ? "no memory" : args->message};
}

XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->size;
  return nullptr;
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const Kernels not_its(false);
  const std::lock_guard lock(args->ctx->mutex);
  args->ctx->threads.emplace_back([task = args->task, data = args->data] {
    const Kernels its(true);
    task(data);
  });
  return nullptr;
}

XLA_FFI_Api api() {
  XLA_FFI_Api result{};
  result.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  result.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                        XLA_FFI_API_MINOR};
  result.XLA_FFI_Error_Create = error_create;
  result.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
  result.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  result.XLA_FFI_ThreadPool_Schedule = schedule;
  result.XLA_FFI_ThreadPool_NumThreads = num_threads;
  return result;
}

// One call by this thread; the error's text, if any.
std::string run(void* library, Call& call) {
  auto* kernel = reinterpret_cast<XLA_FFI_Handler*>(dlsym(library, call.name.c_str()));
  check(kernel != nullptr, "no such kernel");
  std::vector<XLA_FFI_Buffer> buffers;
  buffers.reserve(call.args.size() + call.results.size());
  const auto pointers = [&](std::vector<Array>& arrays) {
    std::vector<void*> result;
    for (Array& array : arrays) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, array.data,
                         Index(array.dims.size()), array.dims.data()});
      result.push_back(&buffers.back());
    }
    return result;
  };
  std::vector<void*> args = pointers(call.args), results = pointers(call.results);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);
  const std::size_t count = call.attributes.size();
  std::vector<XLA_FFI_AttrType> types(count, XLA_FFI_AttrType_SCALAR);
  std::vector<XLA_FFI_ByteSpan> names(count);
  std::vector<XLA_FFI_Scalar> scalars(count);
  std::vector<XLA_FFI_ByteSpan*> name_pointers(count);
  std::vector<void*> values(count);
  bool truth[] = {false, true};
  for (std::size_t i = 0; i < count; ++i) {
    Attribute& attribute = call.attributes[i];
    names[i] = {attribute.name.data(), attribute.name.size()};
    if (attribute.truth) {
      scalars[i] = {XLA_FFI_DataType_PRED, &truth[attribute.value != 0]};
    } else {
      scalars[i] = {XLA_FFI_DataType_S64, &attribute.value};
    }
    name_pointers[i] = &names[i];
    values[i] = &scalars[i];
  }
  const XLA_FFI_Api functions = api();
  XLA_FFI_ExecutionContext context{.size = call.threads, .mutex = {}, .threads = {}};
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &functions;
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, Index(args.size()), arg_types.data(),
                args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, Index(results.size()), result_types.data(),
                results.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, Index(count), types.data(),
                 name_pointers.data(), values.data()};
  XLA_FFI_Error* error;
  {
    const Kernels its(true);
    error = kernel(&frame);
  }
  context.wait();
  if (error == nullptr) return "";
  const std::string message = error->message;
  delete error;
  return message.empty() ? "an error" : message;
}

// A copy of the call with arrays of its own, so that what is written over an argument is undone.
struct Given {
  Call call;

  Given(const Call& made, Random random) : call(made) {
    const Kernels its(true);  // arrays end before forbidden pages, too
    for (Array& array : call.args) {
      array.data = static_cast<char*>(operator new(array.bytes(), std::align_val_t(place(array))));
      fill(random, array);
    }
    for (Array& array : call.results) {
      array.data = array.in_place_of < 0 ? static_cast<char*>(operator new(
                                               array.bytes(), std::align_val_t(place(array))))
                                         : call.args[array.in_place_of].data;
    }
  }
  ~Given() {
    for (Array& array : call.args) operator delete(array.data, std::align_val_t(place(array)));
    for (Array& array : call.results) {
      if (array.in_place_of < 0) operator delete(array.data, std::align_val_t(place(array)));
    }
  }
  Given(const Given&) = delete;

  static std::size_t place(const Array& array) { return std::size_t(size_of(array.type)); }

  std::string results() const {
    std::string all;
    for (const Array& array : call.results) all.append(array.data, array.bytes());
    return all;
  }
};

// --- shapes --------------------------------------------------------------------------------

// Mostly small, and beside multiples of vectors.
Index size(Random& random, Index most) {
  Index result = 0;
  const Index vectors = (Index(4) << below(random, 5)) * (1 + below(random, 3));
  switch (below(random, 3)) {
    case 0: result = 1 + below(random, 5); break;
    case 1: result = vectors + below(random, 3) - 1; break;
    default: result = 1 + below(random, most);
  }
  return std::clamp<Index>(result, 1, most);
}

Array numbers(Dims dims) { return {number, std::move(dims)}; }

bool flip(Random& random) { return random() % 2 == 0; }

Call lstm(Random& random, const std::string& kernel, Index i) {
  // Those at which blocks were once left, as (batch, time, inputs, hidden).
  const Index known[][4] = {{1, 1, 1, 1}, {64, 64, 4, 16}, {64, 64, 6, 17}, {64, 64, 4, 32},
                            {64, 64, 64, 65}};
  Index batch = size(random, 130), time = size(random, 12), inputs = size(random, 90);
  Index hidden = flip(random) ? inputs : size(random, 90);
  if (i < 5) {
    batch = known[i][0], time = known[i][1], inputs = known[i][2], hidden = known[i][3];
  } else if (i % 50 == 7 && kernel == "puffer_jax_lstm_step") {
    batch = 1000 + below(random, 60);  // from 1024 on it is another kernel's work
  }
  const Array of_x = numbers({4 * hidden, inputs}), of_h = numbers({4 * hidden, hidden});
  const Array bias = numbers({4 * hidden}), state = numbers({batch, hidden});
  if (kernel == "puffer_jax_lstm_step") {
    const Array x = numbers({batch, inputs});
    return {kernel, {of_x, of_h, bias, bias, x, state, state}, {state, state}};
  }
  const Array x = numbers({batch * time, inputs}), outputs = numbers({batch * time, hidden});
  const Array done{XLA_FFI_DataType_PRED, {batch, time}}, kept = numbers({time, batch, 5, hidden});
  if (kernel == "puffer_jax_lstm_forward") {
    const bool keep = flip(random);
    Call call{kernel, {of_x, of_h, bias, x, state, state, done},
              {outputs, state, state, keep ? kept : numbers({0})}};
    if (!keep && inputs == hidden) call.results[0].in_place_of = 3;
    return call;
  }
  Call call{kernel, {of_x, of_h, x, state, state, done, outputs, kept, outputs, state, state},
            {of_x, of_h, bias, x, state, state}};
  if (inputs == hidden) call.results[3].in_place_of = 8;
  return call;
}

// Convolutions and their gradients, of numbers or of bytes.
Call convolution(Random& random, const std::string& kernel) {
  const bool of_images = kernel == "puffer_jax_convolve_images_gradient";
  const bool bytes = !of_images && flip(random), planes = bytes && flip(random);
  const bool across = flip(random), rectify = !bytes && flip(random);
  const Index batch = 1 + below(random, 4), channels = size(random, 24), outputs = size(random, 70);
  Index sides[2], window[2], stride[2], pad[2], made[2];
  for (int k = 0; k < 2; ++k) {
    pad[k] = below(random, 3) * below(random, 4);
    sides[k] = size(random, 24);
    window[k] = 1 + below(random, std::min<Index>(6, sides[k] + 2 * pad[k]));
    stride[k] = 1 + below(random, 2 + below(random, 12));
    made[k] = (sides[k] + 2 * pad[k] - window[k]) / stride[k] + 1;
  }
  const auto image = [&](bool first, const Index* of, Index depth) {
    return first ? Dims{batch, depth, of[0], of[1]} : Dims{batch, of[0], of[1], depth};
  };
  const Array x{bytes ? XLA_FFI_DataType_U8 : number, image(planes, sides, channels)};
  const Array weights = numbers({window[0], window[1], channels, outputs});
  const Array bias = numbers({outputs}), d_out = numbers(image(false, made, outputs));
  std::vector<Attribute> attributes{
      {"channels_first", planes, true},  {"pad_columns", pad[1]},     {"pad_rows", pad[0]},
      {"rectify", rectify, true},        {"stride_columns", stride[1]}, {"stride_rows", stride[0]},
  };
  if (of_images) return {kernel, {x, weights, d_out}, {x}, attributes};
  if (kernel == "puffer_jax_convolve_weights_gradient") {
    return {kernel, {x, d_out}, {weights, bias}, attributes};
  }
  attributes.insert(attributes.begin() + 1, {"out_channels_first", across, true});
  return {kernel, {x, weights, bias}, {numbers(image(across, made, outputs))}, attributes};
}

// Max pooling; its gradient gets taps that lie within the image.
Call pooling(Random& random, const std::string& kernel) {
  const Index batch = 1 + below(random, 4), channels = size(random, 40);
  const Index height = size(random, 20), width = size(random, 20);
  const Array x = numbers({batch, height, width, channels});
  const Dims made{batch, (height + 1) / 2, (width + 1) / 2, channels};
  const Array taken{XLA_FFI_DataType_S8, made};
  if (kernel == "puffer_jax_max_pool_gradient") {
    Array middle = taken;
    middle.value = 4;  // every window has its middle
    return {kernel, {middle, numbers(made)}, {x}};
  }
  const Array none{XLA_FFI_DataType_S8, {0}};
  return {kernel, {x}, {numbers(made), flip(random) ? taken : none}};
}

// Linear layers and perceptrons.
Call linear(Random& random, const std::string& kernel) {
  const Index batch = flip(random) ? size(random, 300) : 1 + below(random, 8);
  const Index inputs = size(random, 150), hidden = size(random, 150);
  const Array x = numbers({batch, inputs});
  const bool two_layers = kernel.find("perceptron") != std::string::npos;
  const Index joint = below(random, 4) ? size(random, 40) : 0;
  if (kernel == "puffer_jax_linear_gradient") {
    const Index outputs = std::max<Index>(1, joint);
    const Array weights = numbers({inputs, outputs});
    return {kernel, {x, weights, numbers({batch, outputs})}, {x, weights, numbers({outputs})}};
  }
  const Array w1 = numbers({inputs, hidden}), b1 = numbers({hidden});
  if (kernel == "puffer_jax_perceptron_gradient") {
    const Array w2 = numbers({hidden, joint}), b2 = numbers({joint});
    const Array d = numbers({batch, joint ? joint : hidden});
    return {kernel, {x, w1, b1, w2, d}, {w1, b1, w2, b2}};
  }
  Call call{kernel, {x}, {}};
  if (two_layers) call.args.insert(call.args.end(), {w1, b1});
  const Index heads = below(random, 4) + (two_layers ? 0 : 1);
  for (Index i = 0; i < heads; ++i) {
    const Index outputs = size(random, 40);
    const Array bias = numbers({outputs});
    call.args.insert(call.args.end(), {numbers({two_layers ? hidden : inputs, outputs}), bias});
    call.results.push_back(numbers({batch, outputs}));
  }
  if (heads == 0) call.results.push_back(numbers({batch, hidden}));
  return call;
}

Call adam(Random& random, const std::string& kernel) {
  const Array all = numbers({flip(random) ? size(random, 200) : 30000 + below(random, 9000)});
  Call call{kernel, {numbers({9}), all, all, all, all}, {all, all, all}};
  call.args[0].value = 0;  // a rate of nothing, but above all: do not skip it
  for (int i = 0; i < 3; ++i) call.results[i].in_place_of = 2 + i;
  return call;
}

Call recurrence(Random& random, const std::string& kernel) {
  const Array all = numbers({size(random, 200), size(random, 70)});
  return {kernel, {all, all}, {all}};
}

Call mingru(Random& random, const std::string& kernel) {
  const Index time = size(random, 9), batch = size(random, 70), hidden = size(random, 300);
  const Array all = numbers({time, batch, hidden}), gates = numbers({time, batch, 3 * hidden});
  const Array state = numbers({batch, hidden});
  const Array starts{XLA_FFI_DataType_PRED, flip(random) ? Dims{time, batch} : Dims{0, 0}};
  if (kernel == "puffer_jax_mingru_backward") {
    Call call{kernel, {all, gates, state, starts, all, all, state}, {all, gates, state}};
    call.results[0].in_place_of = 5;
    call.results[2].in_place_of = 6;
    return call;
  }
  if (flip(random)) return {kernel, {all, gates, state, starts}, {all, state, all}};
  Call call{kernel, {all, gates, state, starts}, {all, state, numbers({0})}};
  call.results[0].in_place_of = 0;
  call.results[1].in_place_of = 2;
  return call;
}

Call drawing(Random& random, const std::string& kernel) {
  const Index keys = size(random, 20), rows = size(random, 60), n = size(random, 300);
  const Array key{XLA_FFI_DataType_U32, {keys, 2}};
  if (kernel == "puffer_jax_threefry") {
    const Index count = flip(random) ? size(random, 200) : 4000 + below(random, 200);
    return {kernel, {key}, {{XLA_FFI_DataType_U32, {keys, count, 2}}}};
  }
  const Array logits = numbers({keys, rows, n}), each = numbers({keys, rows});
  const Array actions{XLA_FFI_DataType_S32, {keys, rows}};
  if (kernel == "puffer_jax_categorical") return {kernel, {key, logits}, {actions}};
  return {kernel, {key, logits}, {actions, each, each}, {{"component", below(random, 5)}}};
}

Call draw(Random& random, const std::string& kernel, Index i) {
  const auto has = [&](const char* part) { return kernel.find(part) != std::string::npos; };
  Call call = has("lstm")        ? lstm(random, kernel, i)
              : has("convolve")  ? convolution(random, kernel)
              : has("max_pool")  ? pooling(random, kernel)
              : has("adam")      ? adam(random, kernel)
              : has("recur")     ? recurrence(random, kernel)
              : has("mingru")    ? mingru(random, kernel)
              : has("linear") || has("perceptron") ? linear(random, kernel)
                                                   : drawing(random, kernel);
  call.threads = 1 + i % 3;
  return call;
}

// --- what is tried -------------------------------------------------------------------------

std::string described(const Call& call) {
  std::string text = call.name + ",";
  const auto add = [&](const std::vector<Array>& arrays) {
    for (const Array& array : arrays) {
      text += " (";
      for (const Index n : array.dims) text += std::to_string(n) + ",";
      text += ")";
    }
  };
  add(call.args);
  text += " ->";
  add(call.results);
  for (const Attribute& a : call.attributes) text += " " + a.name + "=" + std::to_string(a.value);
  return text + " threads=" + std::to_string(call.threads);
}

// In a thread of its own, whose memory is as large as the calls in it need, and no larger.
template <typename Body>
void alone(const Body& body) {
  std::thread(body).join();
}

// Every allocation fails once; after each failure, the same call does its work all the same.
void starve(void* library, const Call& call, const Random& random) {
  Given expected(call, random);
  alone([&] { check(run(library, expected.call).empty(), "a call with enough memory"); });
  bool enough = false;
  for (int n = 0; !enough; ++n) {
    alone([&] {
      Given first(call, random), second(call, random);
      until_failure = n;
      const std::string message = run(library, first.call);
      enough = until_failure.exchange(-1) >= 0;
      check(message.empty() || message == "no memory", message.c_str());
      check(!enough || message.empty(), "an error though there was memory");
      check(run(library, second.call).empty(), "the call after one without memory");
      check(second.results() == expected.results(), "results after a call without memory");
    });
  }
}

void attempt(void* library, const Call& call, const Random& random) {
  std::printf("%s\n", described(call).c_str());
  std::fflush(stdout);
  if (mode == Mode::kStarve) return starve(library, call, random);
  alone([&] {
    Given given(call, random);
    const std::string message = run(library, given.call);
    check(message.empty(), message.c_str());
    if (written != nullptr) {
      for (const Array& array : given.call.results) {
        const Index head[] = {array.type, array.count()};
        std::fwrite(head, sizeof(head), 1, written);
        std::fwrite(array.data, array.bytes(), 1, written);
      }
    }
  });
}

int main(int count, char** words) {
  check(count >= 6, "LIBRARY float|double MODE SHAPES SEED KERNEL...");
  const std::string type = words[2], how = words[3];
  number = type == "double" ? XLA_FFI_DataType_F64 : XLA_FFI_DataType_F32;
  mode = how == "end"      ? Mode::kEnd
         : how == "begin"  ? Mode::kBegin
         : how == "starve" ? Mode::kStarve
                           : Mode::kPlain;
  if (how.starts_with("write=")) {
    written = std::fopen(how.substr(6).c_str(), "wb");
    check(written != nullptr, "the file for results cannot be written");
  }
  void* library = dlopen(words[1], RTLD_NOW);
  check(library != nullptr, "the library does not load");
  if (mode == Mode::kEnd || mode == Mode::kBegin) forbid(nullptr, kArena);
  for (int k = 6; k < count; ++k) {
    for (Index i = 0; i < std::atoll(words[4]); ++i) {
      std::vector<std::int64_t> parts(words[k], words[k] + std::strlen(words[k]));
      parts.insert(parts.end(), {std::atoll(words[5]), i});
      std::seed_seq seeds(parts.begin(), parts.end());
      Random random(seeds);
      const Call call = draw(random, words[k], i);
      attempt(library, call, random);
    }
  }
  if (written != nullptr) check(std::fclose(written) == 0, "the results are not all written");
  std::printf("done\n");
}
