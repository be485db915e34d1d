// The software CUDA device: fibers, meeting points and the warp-wide instructions. See emulate.h.
#include "ptx.cuh"

#include "../layalign.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

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
constexpr size_t kGuard = kWatching ? 4096 : 0;  // bytes after shared memory, which no kernel may touch
constexpr size_t kMaxShared = 99 << 10;  // of a block on sm_86 and sm_89; sm_80 and sm_90 have more

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
struct Access {
  const void* instruction;
  uint32_t at, bytes;
};
struct Fiber {
  Context context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<Copy> copies;
  std::vector<Access> accesses;  // of shared memory, since its warp met
};
// Who used 2 bytes of shared memory last. Times are counts of barriers and of sync_warp; 0 is never.
struct Cell {
  uint32_t written, written_in_warp, read, read_in_warp;
  uint32_t warps;  // that read since the barrier
  uint32_t lanes;  // of the warp that read last, since its sync_warp
  uint16_t writer, reader_warp;
};
struct Warp {
  int arrived;
  uint32_t syncs;
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
  uint32_t barriers = 0;  // since the start, blocks' beginnings too
  std::vector<Cell> cells;
  std::map<std::string, Traffic> traffic;
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

// -- watching shared memory -------------------------------------------------------------------------------------------

#if defined(LAYALIGN_WATCH_SHARED)
[[noreturn]] void stop(const std::string& text) {  // like fail(), for callers whose frames take no exception
  device().error = text + " (block " + std::to_string(place.block) + ")";
  to_host(true);
  abort();
}

// `at`: of shared memory.
void watch_race(int thread, size_t at, size_t bytes, bool write) {
  Device& d = device();
  const int warp = thread >> 5;
  const uint32_t syncs = d.warps[warp].syncs, lane = 1u << (thread & 31), now = d.barriers;
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Cell& cell = d.cells[i];
    const bool fresh = cell.read != now;
    const bool same_lanes = !fresh && cell.reader_warp == warp && cell.read_in_warp == syncs;
    const bool written = cell.written == now && cell.writer != thread &&
                         (cell.writer >> 5 != warp || cell.written_in_warp == syncs);
    const bool read = write && !fresh && (cell.warps & ~(1u << warp) || (same_lanes && cell.lanes & ~lane));
    if (written || read) {
      stop("threads " + std::to_string(thread) + " and " + (written ? std::to_string(cell.writer) : "others") +
           " use byte " + std::to_string(2 * i) + " of shared memory without a barrier between, one writes, in " +
           place.kernel);
    }
    if (write) {
      cell.written = now, cell.written_in_warp = syncs, cell.writer = static_cast<uint16_t>(thread);
    } else {
      cell.warps = (fresh ? 0 : cell.warps) | 1u << warp;
      cell.lanes = (same_lanes ? cell.lanes : 0) | lane;
      cell.read = now, cell.read_in_warp = syncs, cell.reader_warp = static_cast<uint16_t>(warp);
    }
  }
}

void watch(const void* pointer, size_t bytes, bool write, const void* instruction) {
  Device& d = device();
  const size_t at = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - place.shared);
  if (at >= d.shared + kGuard) return;
  if (at + bytes > d.shared) stop("an access outside of shared memory, at byte " + std::to_string(at));
  d.fibers[place.thread].accesses.push_back({instruction, static_cast<uint32_t>(at), static_cast<uint32_t>(bytes)});
  watch_race(place.thread, at, bytes, write);
}

// One instruction of a warp: lanes[i] is null where lane i does not take part.
void count_access(const Access* const (&lanes)[32], Traffic* traffic) {
  uint32_t bytes = 0;
  for (const Access* access : lanes) bytes = access ? std::max(bytes, access->bytes) : bytes;
  const int width = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += width) {
    uint32_t words[32][32];
    int count[32] = {}, turns = 0;
    for (int i = first; i < first + width; ++i) {
      if (!lanes[i]) continue;
      for (uint32_t word = lanes[i]->at / 4; word < (lanes[i]->at + lanes[i]->bytes + 3) / 4; ++word) {
        uint32_t* const begin = words[word % 32];
        int& n = count[word % 32];
        if (std::find(begin, begin + n, word) == begin + n) begin[n++] = word;
        turns = std::max(turns, n);
      }
    }
    traffic->turns += turns;
    traffic->phases += turns > 0;
  }
}

// Between two meetings of a warp its lanes ran one after another: the k-th access of an instruction by one lane goes
// with the k-th of it by the others.
void settle(int warp) {
  Fiber* const fibers = &device().fibers[32 * warp];
  Traffic& traffic = device().traffic[place.kernel ? place.kernel : ""];
  bool same = true;
  for (int i = 1; i < 32 && same; ++i) {
    const auto equal = [](const Access& a, const Access& b) { return a.instruction == b.instruction; };
    same = std::equal(fibers[0].accesses.begin(), fibers[0].accesses.end(), fibers[i].accesses.begin(),
                      fibers[i].accesses.end(), equal);
  }
  const Access* lanes[32];
  if (same) {
    for (size_t k = 0; k < fibers[0].accesses.size(); ++k) {
      for (int i = 0; i < 32; ++i) lanes[i] = &fibers[i].accesses[k];
      count_access(lanes, &traffic);
    }
  } else {
    std::map<const void*, std::vector<std::array<const Access*, 32>>> instructions;
    for (int i = 0; i < 32; ++i) {
      std::map<const void*, size_t> counts;
      for (const Access& access : fibers[i].accesses) {
        auto& all = instructions[access.instruction];
        const size_t k = counts[access.instruction]++;
        if (k == all.size()) all.push_back({});
        all[k][static_cast<size_t>(i)] = &access;
      }
    }
    for (const auto& entry : instructions) {
      for (const auto& access : entry.second) {
        std::copy(access.begin(), access.end(), lanes);
        count_access(lanes, &traffic);
      }
    }
  }
  for (int i = 0; i < 32; ++i) fibers[i].accesses.clear();
}

void settle_all() {
  for (int warp = 0; warp < device().threads / 32; ++warp) settle(warp);
  ++device().barriers;
}
#else
void watch_race(int, size_t, size_t, bool) {}
void watch(const void*, size_t, bool, const void*) {}
void settle(int) {}
void settle_all() {}
#endif

void run_block(int64_t block) {
  Device& d = device();
  // Not a multiple of the alignment: memory after the last byte does not belong to the kernel.
  void* memory = nullptr;
  if (d.shared && posix_memalign(&memory, 128, d.shared + kGuard)) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&free)> owner(memory, &free);
  if (memory) memset(memory, 0xff, d.shared);
  place.block = block;
  place.shared = static_cast<unsigned char*>(memory);
  place.kernel = nullptr;
  ++d.barriers;
#if defined(LAYALIGN_WATCH_SHARED)
  d.cells.resize(d.shared / 2 + 1);
#endif
  d.head = d.waiting = d.at_barrier = d.finished = 0;
  memset(d.warps, 0, sizeof d.warps);
  for (int i = 0; i < d.threads; ++i) {
    d.fibers[i].copies.clear();
    d.fibers[i].accesses.clear();
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
      settle_all();
      for (int i = 0; i < d.threads; ++i) push(i);
    }
    resume(pop());
    if (!d.error.empty()) return;
  }
  settle_all();
}

}  // namespace

void set_order(uint64_t seed) {
  device().order = seed;
  device().random = seed * 0x9e3779b97f4a7c15u + 1;
}
int64_t bank_conflicts() { return device().conflicts; }
std::vector<Traffic> take_traffic() {
  std::vector<Traffic> all;
  for (const auto& entry : device().traffic) {
    if (entry.second.phases) all.push_back({entry.first, entry.second.phases, entry.second.turns});
  }
  device().traffic.clear();
  return all;
}

void run(const char* name, Body body, const void* parameters, int64_t blocks, int threads, size_t shared) {
  Device& d = device();
  const std::lock_guard<std::mutex> lock(d.mutex);
  if (threads < 1 || threads > kMaxThreads || threads % 32) throw Error(std::string(name) + ": bad block size");
  if (shared > kMaxShared) throw Error(std::string(name) + ": too much shared memory");
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
    place.shared = nullptr;  // the host's accesses are watched too where they come from the kernels' files
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
  settle(place.thread >> 5);
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

void order_memory(void* const*) { ++device().warps[place.thread >> 5].syncs; }

namespace {
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
size_t place_of(const void* pointer) {
  return static_cast<size_t>(static_cast<const unsigned char*>(pointer) - place.shared);
}
}  // namespace

void load(void* to, const void* from, int bytes) {
  check_aligned(from, bytes, "a vector load");
  watch(from, static_cast<size_t>(bytes), false, __builtin_return_address(0));
  bytes == 16 ? memcpy(to, from, 16) : memcpy(to, from, 8);
}
void store(void* to, const void* from, int bytes) {
  check_aligned(to, bytes, "a vector store");
  watch(to, static_cast<size_t>(bytes), true, __builtin_return_address(0));
  bytes == 16 ? memcpy(to, from, 16) : memcpy(to, from, 8);
}
void store_zeros(void* to) {
  check_shared(to, 16, "a store");
  check_aligned(to, 16, "a store");
  watch(to, 16, true, __builtin_return_address(0));
  memset(to, 0, 16);
}

void copy_later(void* to, const void* from, int bytes) {
  check_shared(to, bytes, "cp.async");
  check_aligned(to, bytes, "cp.async");
  check_aligned(from, bytes, "cp.async");
  watch(to, static_cast<size_t>(bytes), true, __builtin_return_address(0));
  memset(to, 0xff, static_cast<size_t>(bytes));
  device().fibers[place.thread].copies.push_back(Copy{to, from, bytes});
}
void finish_copies() {
  std::vector<Copy>& copies = device().fibers[place.thread].copies;
  for (const Copy& copy : copies) {
    watch_race(place.thread, place_of(copy.to), static_cast<size_t>(copy.bytes), true);
    memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
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
      watch_race((place.thread & ~31) + 8 * matrix + r, place_of(row), 16, false);
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

// -- what -fsanitize=thread calls before each access ------------------------------------------------------------------

#if defined(LAYALIGN_WATCH_SHARED)
#define WATCH(name, write, bytes)                                                    \
  extern "C" void __tsan_##name(void* at) {                                          \
    layalign::cuda::emulation::watch(at, bytes, write, __builtin_return_address(0)); \
  }
#define WATCH_BYTES(bytes)                   \
  WATCH(read##bytes, false, bytes)           \
  WATCH(write##bytes, true, bytes)           \
  WATCH(unaligned_read##bytes, false, bytes) \
  WATCH(unaligned_write##bytes, true, bytes)
WATCH_BYTES(1)
WATCH_BYTES(2)
WATCH_BYTES(4)
WATCH_BYTES(8)
WATCH_BYTES(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) {
  layalign::cuda::emulation::watch(at, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t bytes) {
  layalign::cuda::emulation::watch(at, bytes, true, __builtin_return_address(0));
}
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {  // clang's, as the next
  layalign::cuda::emulation::watch(from, bytes, false, __builtin_return_address(0));
  layalign::cuda::emulation::watch(to, bytes, true, __builtin_return_address(0));
  return memcpy(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
  layalign::cuda::emulation::watch(to, bytes, true, __builtin_return_address(0));
  return memset(to, value, bytes);
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif
