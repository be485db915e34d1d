// A CUDA device in software, for tests: the kernels' sources compiled as C++ with LAYALIGN_EMULATE_CUDA.
//
// Every thread of a block is a fiber; blocks run one after another. Barriers and warp-wide instructions are meeting
// points, and threads that meet at different ones are an error that names the kernel. Between two meeting points a
// fiber runs alone, in an order that `set_order` chooses: a missing barrier shows as a wrong or changing result.
// Shared memory has exactly the size asked for and starts as NaN. An asynchronous copy makes its destination NaN when
// it is issued and delivers when its thread waits for it, so both reading too early and overwriting too early show.
// Fragments of ldmatrix and mma.sync are laid out as the PTX manual says.
//
// Compiled with -fsanitize=thread and LAYALIGN_WATCH_SHARED, without that sanitizer's library, every access of a kernel
// to memory calls emulate.cpp, which then also finds, in shared memory:
// - races: two threads use the same bytes, one of them writes, and no barrier lies between;
// - bank conflicts: what the lanes of a warp access by one instruction counts as one access.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define DEVICE inline
#define HOST_DEVICE constexpr
#define KERNEL_PARAMETER const

namespace layalign::cuda {

namespace emulation {

// 0: first come, first served; 1: the latest first, threads in reverse; others: random with this seed.
void set_order(uint64_t seed);
// 16-byte rows of ldmatrix that had to wait for another one in the same banks, since the start.
int64_t bank_conflicts();

// A kernel's accesses to shared memory since the last call of take_traffic(). A warp's access is served in one phase of
// 32 lanes, in two of 16 for 8 bytes a lane, in four of 8 for 16 bytes. A phase takes as many turns as the busiest of
// the 32 banks has different 4-byte words to give.
struct Traffic {
  std::string kernel;
  int64_t phases, turns;
};
std::vector<Traffic> take_traffic();
#if defined(LAYALIGN_WATCH_SHARED)
constexpr bool kWatching = true;
#else
constexpr bool kWatching = false;
#endif

struct Place {
  int thread;
  int64_t block;
  int64_t blocks;
  unsigned char* shared;
  const char* kernel;
};
extern Place place;  // of the fiber that runs

using Operation = void (*)(void* const* lanes);
void meet_warp(Operation operation, void* argument);  // the last of 32 lanes carries it out for all
void meet_block();
void load(void* to, const void* from, int bytes);   // 8 or 16 bytes
void store(void* to, const void* from, int bytes);  // likewise
void copy_later(void* to, const void* from, int bytes);
void store_zeros(void* to);  // 16 bytes
void finish_copies();

using Body = void (*)(const void* parameters);
void run(const char* name, Body body, const void* parameters, int64_t blocks, int threads, size_t shared);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat(float x);

struct Shuffle {
  uint32_t value;
  int mask;
  uint32_t result;
};
void shuffle(void* const* lanes);
struct Matrices {
  uint32_t* to;
  const void* row;
};
void load_matrices(void* const* lanes);
void load_matrices_transposed(void* const* lanes);
struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};
void multiply_half(void* const* lanes);
void multiply_bfloat(void* const* lanes);
void order_memory(void* const* lanes);

}  // namespace emulation

inline int thread_index() { return emulation::place.thread; }
inline int lane_index() { return emulation::place.thread & 31; }
inline int warp_index() { return emulation::place.thread >> 5; }
inline int64_t block_index() { return emulation::place.block; }
inline int64_t block_count() { return emulation::place.blocks; }

inline void sync_threads() { emulation::meet_block(); }
inline void sync_warp() { emulation::meet_warp(emulation::order_memory, nullptr); }
inline int shuffle_xor(int value, int mask) {
  emulation::Shuffle call{static_cast<uint32_t>(value), mask, 0};
  emulation::meet_warp(emulation::shuffle, &call);
  return static_cast<int>(call.result);
}
inline float shuffle_xor(float value, int mask) {
  int bits;
  memcpy(&bits, &value, 4);
  bits = shuffle_xor(bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned char* shared_memory(const char* kernel = __builtin_FUNCTION()) {
  emulation::place.kernel = kernel;
  return emulation::place.shared;
}

inline void cp_async16(void* to, const void* from, bool there) {
  there ? emulation::copy_later(to, from, 16) : emulation::store_zeros(to);
}
inline void cp_async4(void* to, const void* from) { emulation::copy_later(to, from, 4); }
inline void cp_async_wait() { emulation::finish_copies(); }

inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  emulation::Matrices call{to, row};
  emulation::meet_warp(emulation::load_matrices, &call);
}
inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  emulation::Matrices call{to, row};
  emulation::meet_warp(emulation::load_matrices_transposed, &call);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  emulation::Product call{c, a, {b0, b1}};
  emulation::meet_warp(emulation::multiply_half, &call);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat) {
  emulation::Product call{c, a, {b0, b1}};
  emulation::meet_warp(emulation::multiply_bfloat, &call);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_of(float x) { return std::log2(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float infinity() { return HUGE_VALF; }

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return emulation::half_to_float(x.bits); }
inline float to_float(BFloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline void from_float(float* to, float x) { *to = x; }
inline void from_float(Half* to, float x) { to->bits = emulation::float_to_half(x); }
inline void from_float(BFloat* to, float x) { to->bits = emulation::float_to_bfloat(x); }

inline uint32_t pack(float first, float second, Half) {
  return emulation::float_to_half(first) | static_cast<uint32_t>(emulation::float_to_half(second)) << 16;
}
inline uint32_t pack(float first, float second, BFloat) {
  return emulation::float_to_bfloat(first) | static_cast<uint32_t>(emulation::float_to_bfloat(second)) << 16;
}
inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

template <typename To>
inline To aligned_load(const void* from) {
  To x;
  emulation::load(&x, from, sizeof x);
  return x;
}
template <typename From>
inline void aligned_store(void* to, const From& x) {
  emulation::store(to, &x, sizeof x);
}
inline Words4 load_words(const void* from) { return aligned_load<Words4>(from); }
inline Words4 load_words_cached(const void* from) { return aligned_load<Words4>(from); }
inline void store_words(void* to, const Words4& x) { aligned_store(to, x); }
inline Float4 load_float4(const void* from) { return aligned_load<Float4>(from); }
inline Float2 load_float2(const void* from) { return aligned_load<Float2>(from); }
inline void store_float4(void* to, const Float4& x) { aligned_store(to, x); }
inline void store_float2(void* to, const Float2& x) { aligned_store(to, x); }
inline void store_pair(void* to, uint32_t first, uint32_t second) {
  aligned_store(to, static_cast<uint64_t>(second) << 32 | first);
}

}  // namespace layalign::cuda
