// Runs the blocks and threads of a kernel on the host, in random order, and checks every access: see cuda_on_host.py.
// It is compiled three times: as CUDA_BEFORE and CUDA_AFTER it only marks where shared memory begins and ends.

// Shared memory is in section cuda_shared, except that of templates, which g++ puts into .bss.
#if defined(CUDA_BEFORE)
extern "C" {
__attribute__((section("cuda_shared"), aligned(64))) char cuda_shared_before[4096] = {1};
__attribute__((aligned(64))) char cuda_templates_before[4096];
}
#elif defined(CUDA_AFTER)
extern "C" {
__attribute__((section("cuda_shared"), aligned(64))) char cuda_shared_after[4096] = {1};
__attribute__((aligned(64))) char cuda_templates_after[4096];
}
#else
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define STATE static __attribute__((section("cuda_state")))  // not in .bss, which is poisoned

struct CudaIndex {
  unsigned x, y, z;
};
struct Range {
  uintptr_t low, high;
};
struct Fiber {
  jmp_buf resume;
  CudaIndex thread;
  int barrier_line;
  enum { NEW, READY, WAITING, DONE } state;
};

extern "C" {
__attribute__((section("cuda_state"))) CudaIndex threadIdx = {}, blockIdx = {}, blockDim = {}, gridDim = {};
extern char cuda_shared_before[4096], cuda_shared_after[4096], cuda_templates_before[4096], cuda_templates_after[4096];
extern char __ehdr_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));
void cuda_call(void** arguments);
}

static const size_t MOST_THREADS = 1024, STACK = 1 << 16;
STATE Fiber* fibers = nullptr;
STATE char* stacks = nullptr;
STATE Fiber* running = nullptr;
STATE jmp_buf to_scheduler = {}, to_end = {};
STATE void** arguments = nullptr;
STATE const Range* ranges = nullptr;
STATE int range_count = 0;
STATE Range stack = {};
STATE uint64_t random_state = 1;
STATE char* error_text = nullptr;
STATE size_t error_bytes = 0;

static uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static void shuffle(unsigned* order, unsigned count) {
  for (unsigned n = count; n > 1; --n) {
    const unsigned k = static_cast<unsigned>((random_number() >> 32) * n >> 32);
    const unsigned kept = order[n - 1];
    order[n - 1] = order[k];
    order[k] = kept;
  }
}

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int length = vsnprintf(error_text, error_bytes, format, values);
  va_end(values);
  const size_t used = length < 0 ? 0 : static_cast<size_t>(length);
  if (used < error_bytes)
    snprintf(error_text + used, error_bytes - used, "; thread (%u, %u, %u) of block (%u, %u, %u)", threadIdx.x,
             threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  _longjmp(to_end, 1);
}

static bool inside(uintptr_t low, uintptr_t high, const char* from, const char* to) {
  return low >= reinterpret_cast<uintptr_t>(from) && high <= reinterpret_cast<uintptr_t>(to);
}

__attribute__((noinline)) static void check_slowly(uintptr_t low, uintptr_t high, const char* what, Range* last_hit) {
  for (int n = 0; n < range_count; ++n)
    if (low >= ranges[n].low && high <= ranges[n].high) {
      *last_hit = ranges[n];
      return;
    }
  if (low >= stack.low && high <= stack.high) {
    *last_hit = stack;
    return;
  }
  if (inside(low, high, __ehdr_start, _end)) {  // shared memory, indices and constants
    const bool shared = inside(low, high, cuda_shared_before, cuda_shared_after + 4096);
    const bool templates = inside(low, high, cuda_templates_before, cuda_templates_after + 4096);
    if (!shared && !templates) return;
    if (shared && inside(low, high, cuda_shared_before + 4096, cuda_shared_after)) return;
    if (templates && inside(low, high, cuda_templates_before + 4096, cuda_templates_after)) return;
    fail("%s of %zu bytes outside of shared memory", what, static_cast<size_t>(high - low));
  }
  int nearest = -1;
  uintptr_t distance = UINTPTR_MAX;
  for (int n = 0; n < range_count; ++n) {
    const uintptr_t d = low < ranges[n].low ? ranges[n].low - low : low - ranges[n].high + 1;
    if (d < distance) {
      distance = d;
      nearest = n;
    }
  }
  if (nearest < 0) fail("%s of %zu bytes at an invalid address", what, static_cast<size_t>(high - low));
  fail("%s of %zu bytes outside of every array; nearest is array %d of %zu bytes, at byte %lld", what,
       static_cast<size_t>(high - low), nearest, static_cast<size_t>(ranges[nearest].high - ranges[nearest].low),
       static_cast<long long>(low - ranges[nearest].low));
}

#define EXPORT extern "C" __attribute__((visibility("hidden")))

// Each kind of access most often hits the same array as the last one of its kind.
enum { KINDS = 12 };
STATE Range last_hits[KINDS] = {};
template <int KIND> static inline void check(uintptr_t low, size_t bytes, const char* what) {
  if (low < last_hits[KIND].low || low + bytes > last_hits[KIND].high)
    check_slowly(low, low + bytes, what, last_hits + KIND);
}
#define CHECKED(bytes, kind) \
  EXPORT void __asan_load##bytes##_noabort(uintptr_t p) { check<kind>(p, bytes, "read"); } \
  EXPORT void __asan_store##bytes##_noabort(uintptr_t p) { check<kind + 6>(p, bytes, "write"); }
CHECKED(1, 0)
CHECKED(2, 1)
CHECKED(4, 2)
CHECKED(8, 3)
CHECKED(16, 4)
EXPORT void __asan_loadN_noabort(uintptr_t p, size_t bytes) { check<5>(p, bytes, "read"); }
EXPORT void __asan_storeN_noabort(uintptr_t p, size_t bytes) { check<11>(p, bytes, "write"); }
EXPORT void __asan_handle_no_return() {}

struct Place {
  const char* file;
  unsigned line, column;
};
#define UNDEFINED(name, text, ...) \
  EXPORT void __ubsan_handle_##name(const Place* place, ##__VA_ARGS__) { fail(text " in line %u", place->line); }
UNDEFINED(out_of_bounds, "index out of the bounds of an array", uintptr_t)
UNDEFINED(type_mismatch_v1, "misaligned access", uintptr_t)
UNDEFINED(add_overflow, "overflow of a sum", uintptr_t, uintptr_t)
UNDEFINED(sub_overflow, "overflow of a difference", uintptr_t, uintptr_t)
UNDEFINED(mul_overflow, "overflow of a product", uintptr_t, uintptr_t)
UNDEFINED(negate_overflow, "overflow of a negation", uintptr_t)
UNDEFINED(divrem_overflow, "division by zero", uintptr_t, uintptr_t)
UNDEFINED(shift_out_of_bounds, "shift by too many bits", uintptr_t, uintptr_t)
UNDEFINED(float_cast_overflow, "conversion to an integer out of its range", uintptr_t)

extern "C" void cuda_barrier(int line) {
  if (running == nullptr) fail("barrier in a kernel that was compiled without one");
  running->state = Fiber::WAITING;
  running->barrier_line = line;
  if (!_setjmp(running->resume)) _longjmp(to_scheduler, 1);
}

static void fiber_main() {
  for (;;) {
    cuda_call(arguments);
    running->state = Fiber::DONE;
    if (!_setjmp(running->resume)) _longjmp(to_scheduler, 1);
  }
}

static void resume(unsigned n) {
  running = fibers + n;
  threadIdx = running->thread;
  if (_setjmp(to_scheduler)) return;
  const bool is_new = running->state == Fiber::NEW;
  running->state = Fiber::READY;
  if (!is_new) _longjmp(running->resume, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + n * STACK;
  context.uc_stack.ss_size = STACK - n % 64 * 192;  // tops of stacks in different lines of the cache
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

static CudaIndex index_of(size_t n, CudaIndex size) {
  return {static_cast<unsigned>(n % size.x), static_cast<unsigned>(n / size.x % size.y),
          static_cast<unsigned>(n / size.x / size.y)};
}

static void poison(char* from, char* to) {
  const uint16_t pattern = 0x7FFD;  // NaN as float16, float32 and float64
  for (; from + 2 <= to; from += 2) memcpy(from, &pattern, 2);
}

// Threads run up to the next barrier or their end, in random order.
static void run_block(unsigned* order, unsigned threads) {
  static const char message[] = "barrier in line %d, which thread (%u, %u, %u) does not reach";
  for (unsigned n = 0; n < threads; ++n) fibers[n].thread = index_of(n, blockDim);
  for (;;) {
    shuffle(order, threads);
    for (unsigned n = 0; n < threads; ++n) resume(order[n]);
    const Fiber& first = fibers[order[0]];
    for (unsigned n = 0; n < threads; ++n) {
      const Fiber& other = fibers[n];
      if (other.state == first.state && (first.state == Fiber::DONE || other.barrier_line == first.barrier_line)) continue;
      const Fiber& waiting = first.state == Fiber::WAITING ? first : other;
      const CudaIndex absent = (&waiting == &first ? other : first).thread;
      threadIdx = waiting.thread;
      fail(message, waiting.barrier_line, absent.x, absent.y, absent.z);
    }
    if (first.state == Fiber::DONE) return;
  }
}

static void run_block_without_barrier(unsigned* order, unsigned threads) {
  shuffle(order, threads);
  for (unsigned n = 0; n < threads; ++n) {
    threadIdx = index_of(order[n], blockDim);
    cuda_call(arguments);
  }
}

extern "C" size_t cuda_shared_bytes() {
  return static_cast<size_t>(cuda_shared_after - cuda_shared_before - 4096) +
         static_cast<size_t>(cuda_templates_after - cuda_templates_before - 4096);
}

// Return 0, or 1 with a text in `error`. `blocks` has the numbers of the blocks to run, in any order.
extern "C" int cuda_launch(void** values, const Range* arrays, int array_count, const CudaIndex* grid,
                           const CudaIndex* block, const uint64_t* blocks, size_t block_count, int barriers,
                           uint64_t seed, char* error, size_t bytes) {
  static unsigned order[MOST_THREADS] __attribute__((section("cuda_state"))) = {};
  arguments = values;
  ranges = arrays;
  range_count = array_count;
  memset(last_hits, 0, sizeof last_hits);
  random_state = seed * 0x9E3779B97F4A7C15u | 1;
  error_text = error;
  error_bytes = bytes;
  gridDim = *grid;
  blockDim = *block;
  const unsigned threads = block->x * block->y * block->z;
  for (unsigned n = 0; n < threads; ++n) order[n] = n;
  char here;
  stack = {reinterpret_cast<uintptr_t>(&here) - (1 << 18), reinterpret_cast<uintptr_t>(&here)};
  running = nullptr;
  if (barriers) {
    if (stacks == nullptr) {
      const size_t size = MOST_THREADS * (STACK + sizeof(Fiber));
      void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return snprintf(error, bytes, "no memory for the stacks of threads"), 1;
      stacks = static_cast<char*>(memory);
      fibers = reinterpret_cast<Fiber*>(stacks + MOST_THREADS * STACK);
    }
    stack = {reinterpret_cast<uintptr_t>(stacks), reinterpret_cast<uintptr_t>(stacks) + MOST_THREADS * STACK};
  }
  if (_setjmp(to_end)) {
    for (unsigned n = 0; barriers && n < MOST_THREADS; ++n) fibers[n].state = Fiber::NEW;  // also those that wait
    return 1;
  }
  for (size_t n = 0; n < block_count; ++n) {
    blockIdx = index_of(blocks[n], gridDim);
    poison(cuda_shared_before + 4096, cuda_shared_after);
    poison(cuda_templates_before + 4096, cuda_templates_after);
    if (barriers)
      run_block(order, threads);
    else
      run_block_without_barrier(order, threads);
  }
  return 0;
}
#endif
