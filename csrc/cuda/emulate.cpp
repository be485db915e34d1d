// The software CUDA device: fibers, meeting points and the warp-wide instructions. See emulate.h.
#include "ptx.cuh"

#include "../layalign.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace layalign::cuda::emulation {

Place place;

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr int kMaxThreads = 1024;

// -- switching stacks -------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void layalign_switch_stack(void** save, void* load);
asm(R"(
.text
.type layalign_switch_stack, @function
layalign_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size layalign_switch_stack, .-layalign_switch_stack
)");
struct Context {
  void* top = nullptr;
};
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context->top = top;
}
void change(Context* from, Context* to) { layalign_switch_stack(&from->top, to->top); }
#else
struct Context {
  ucontext_t state;
};
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack;
  context->state.uc_stack.ss_size = kStack;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}
void change(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
#endif

// -- the state of the block that runs ---------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<Copy> copies;
};
struct Warp {
  int arrived;
  Operation operation;
  void* arguments[32];
};
struct Device {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  Context host;
  Warp warps[kMaxThreads / 32];
  int ready[kMaxThreads];
  int head, waiting;  // of `ready`
  int threads, at_barrier, finished;
  size_t shared;
  Body body;
  const void* parameters;
  std::string error;
  uint64_t order = 0, random = 1;
  int64_t conflicts = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* host_stack = nullptr;
  size_t host_size = 0;
#endif
};
Device& device() {
  static Device one;
  return one;
}

void push(int thread) {
  Device& d = device();
  d.ready[(d.head + d.waiting++) % kMaxThreads] = thread;
}
int pop() {
  Device& d = device();
  int pick = 0;
  if (d.order == 1) pick = d.waiting - 1;
  if (d.order > 1) {
    d.random ^= d.random << 13;
    d.random ^= d.random >> 7;
    d.random ^= d.random << 17;
    pick = static_cast<int>(d.random % static_cast<uint64_t>(d.waiting));
  }
  int& slot = d.ready[(d.head + pick) % kMaxThreads];
  const int thread = slot;
  --d.waiting;
  if (d.order == 0) d.head = (d.head + 1) % kMaxThreads;
  else slot = d.ready[(d.head + d.waiting) % kMaxThreads];
  return thread;
}

void to_host(bool last) {
  Device& d = device();
  const int thread = place.thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, d.host_stack, d.host_size);
  change(&d.fibers[thread].context, &d.host);
  __sanitizer_finish_switch_fiber(fake, &d.host_stack, &d.host_size);
#else
  (void)last;
  change(&d.fibers[thread].context, &d.host);
#endif
}

[[noreturn]] void fail(const std::string& text) {
  throw Error(text + " (thread " + std::to_string(place.thread) + " of block " + std::to_string(place.block) + ")");
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &device().host_stack, &device().host_size);
#endif
  Device& d = device();
  try {
    d.body(d.parameters);
    if (!d.fibers[place.thread].copies.empty()) fail("a thread ends with copies that it did not wait for");
    ++d.finished;
  } catch (const Error& error) {
    d.error = error.what();  // an exception cannot leave its stack; run() throws another
  }
  to_host(true);
  abort();
}

void resume(int thread) {
  Device& d = device();
  place.thread = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, d.fibers[thread].stack.get(), kStack);
  change(&d.host, &d.fibers[thread].context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  change(&d.host, &d.fibers[thread].context);
#endif
}

void run_block(int64_t block) {
  Device& d = device();
  // Not a multiple of the alignment: memory after the last byte does not belong to the kernel.
  void* memory = nullptr;
  if (d.shared && posix_memalign(&memory, 128, d.shared)) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&free)> owner(memory, &free);
  if (memory) memset(memory, 0xff, d.shared);
  place.block = block;
  place.shared = static_cast<unsigned char*>(memory);
  d.head = d.waiting = d.at_barrier = d.finished = 0;
  memset(d.warps, 0, sizeof d.warps);
  for (int i = 0; i < d.threads; ++i) {
    d.fibers[i].copies.clear();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(d.fibers[i].stack.get(), kStack);  // the last fiber never returned from its frames
#endif
    prepare(&d.fibers[i].context, d.fibers[i].stack.get(), enter);
    push(i);
  }
  while (d.finished < d.threads) {
    if (!d.waiting) {
      if (d.at_barrier != d.threads) {
        d.error = "threads diverge: " + std::to_string(d.at_barrier) + " wait at a block's barrier, " +
                  std::to_string(d.finished) + " have ended, of " + std::to_string(d.threads);
        return;
      }
      d.at_barrier = 0;
      for (int i = 0; i < d.threads; ++i) push(i);
    }
    resume(pop());
    if (!d.error.empty()) return;
  }
}

}  // namespace

void set_order(uint64_t seed) {
  device().order = seed;
  device().random = seed * 0x9e3779b97f4a7c15u + 1;
}
int64_t bank_conflicts() { return device().conflicts; }

void run(const char* name, Body body, const void* parameters, int64_t blocks, int threads, size_t shared) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (threads < 1 || threads > kMaxThreads || threads % 32) throw Error(std::string(name) + ": bad block size");
  while (static_cast<int>(d.fibers.size()) < threads) {
    d.fibers.emplace_back();
    d.fibers.back().stack.reset(new unsigned char[kStack]);
  }
  d.body = body;
  d.parameters = parameters;
  d.threads = threads;
  d.shared = shared;
  d.error.clear();
  place.blocks = blocks;
  for (int64_t i = 0; i < blocks; ++i) {
    run_block(d.order == 1 ? blocks - 1 - i : i);
    if (!d.error.empty()) throw Error(std::string(name) + ": " + d.error);
  }
}

// -- meeting points ---------------------------------------------------------------------------------------------------

void meet_warp(Operation operation, void* argument) {
  Device& d = device();
  Warp& warp = d.warps[place.thread >> 5];
  const int lane = place.thread & 31;
  if (!warp.arrived) warp.operation = operation;
  if (warp.operation != operation) fail("threads of one warp meet at different instructions");
  warp.arguments[lane] = argument;
  if (++warp.arrived < 32) return to_host(false);
  operation(warp.arguments);
  warp.arrived = 0;
  const int first = place.thread & ~31;
  for (int i = 0; i < 32; ++i) {
    if (i != lane) push(first + i);
  }
}

void meet_block() {
  ++device().at_barrier;
  to_host(false);
}

void nothing(void* const*) {}

void check_shared(const void* pointer, int bytes, const char* what) {
  const unsigned char* at = static_cast<const unsigned char*>(pointer);
  if (at < place.shared || at + bytes > place.shared + device().shared) {
    fail(std::string(what) + " outside of shared memory, at byte " + std::to_string(at - place.shared) + " of " +
         std::to_string(device().shared));
  }
}
void check_aligned(const void* pointer, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes)) {
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes from an address that is not a multiple of it");
  }
}

void copy_later(void* to, const void* from, int bytes) {
  check_shared(to, bytes, "cp.async");
  check_aligned(to, bytes, "cp.async");
  check_aligned(from, bytes, "cp.async");
  memset(to, 0xff, static_cast<size_t>(bytes));
  device().fibers[place.thread].copies.push_back(Copy{to, from, bytes});
}
void finish_copies() {
  std::vector<Copy>& copies = device().fibers[place.thread].copies;
  for (const Copy& copy : copies) memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  copies.clear();
}

// -- numbers ----------------------------------------------------------------------------------------------------------

namespace {
float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
const float* half_table() {
  static const std::unique_ptr<float[]> table = [] {
    std::unique_ptr<float[]> made(new float[65536]);
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint32_t sign = (i & 0x8000) << 16, rest = i & 0x7fff;
      // 2^112 moves the exponent's bias from 15 to 127 and makes normal numbers of the subnormal ones.
      const float finite = as_float(as_bits(as_float(rest << 13) * as_float(0x77800000)) | sign);
      made[i] = rest >= 0x7c00 ? as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13) : finite;
    }
    return made;
  }();
  return table.get();
}
float bfloat_to_float(uint32_t bits) { return as_float(bits << 16); }
}  // namespace

float half_to_float(uint16_t bits) { return half_table()[bits]; }

uint16_t float_to_half(float x) {
  const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more become infinity
  if (rest < 0x38800000) {  // subnormal in half: the addition rounds at the right place
    return static_cast<uint16_t>(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000));
  }
  rest += 0xfff + (rest >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rest - 0x38000000) >> 13));
}
uint16_t float_to_bfloat(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// -- warp-wide instructions -------------------------------------------------------------------------------------------

void shuffle(void* const* lanes) {
  for (int i = 0; i < 32; ++i) {
    Shuffle* call = static_cast<Shuffle*>(lanes[i]);
    call->result = static_cast<Shuffle*>(lanes[(i ^ call->mask) & 31])->value;
  }
}

namespace {
// Lane 8 i + r holds the address of row r of matrix i; lane l gets elements 2 (l % 4), + 1 of row l / 4, or of column
// l / 4 when transposed.
void load_four(void* const* lanes, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t rows[8][8];
    uint32_t banks = 0;
    for (int r = 0; r < 8; ++r) {
      const void* row = static_cast<Matrices*>(lanes[8 * matrix + r])->row;
      check_shared(row, 16, "ldmatrix");
      check_aligned(row, 16, "ldmatrix");
      memcpy(rows[r], row, 16);
      const uint32_t bank = 1u << (reinterpret_cast<uintptr_t>(row) >> 4 & 7);
      if (banks & bank) ++device().conflicts;
      banks |= bank;
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t first = transposed ? rows[minor][major] : rows[major][minor];
      const uint32_t second = transposed ? rows[minor + 1][major] : rows[major][minor + 1];
      static_cast<Matrices*>(lanes[lane])->to[matrix] = first | second << 16;
    }
  }
}

template <typename Convert>
void multiply(void* const* lanes, Convert convert) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& call = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      const int shift = 16 * i;
      a[g][t + i] = convert(call.a[0] >> shift & 0xffff);
      a[g + 8][t + i] = convert(call.a[1] >> shift & 0xffff);
      a[g][t + 8 + i] = convert(call.a[2] >> shift & 0xffff);
      a[g + 8][t + 8 + i] = convert(call.a[3] >> shift & 0xffff);
      b[t + i][g] = convert(call.b[0] >> shift & 0xffff);
      b[t + 8 + i][g] = convert(call.b[1] >> shift & 0xffff);
      c[g][t + i] = call.c[i];
      c[g + 8][t + i] = call.c[2 + i];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& call = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      call.c[i] = c[g][t + i];
      call.c[2 + i] = c[g + 8][t + i];
    }
  }
}
}  // namespace

void load_matrices(void* const* lanes) { load_four(lanes, false); }
void load_matrices_transposed(void* const* lanes) { load_four(lanes, true); }
void multiply_half(void* const* lanes) {
  const float* table = half_table();
  multiply(lanes, [table](uint32_t bits) { return table[bits]; });
}
void multiply_bfloat(void* const* lanes) {
  multiply(lanes, [](uint32_t bits) { return bfloat_to_float(bits); });
}

}  // namespace layalign::cuda::emulation
