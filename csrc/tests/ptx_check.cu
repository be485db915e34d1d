// Checks every function of ptx.cuh, one kernel each, against plain scalar arithmetic in the same kernel.
//
// Compiled by nvcc it says whether a device does what the kernels of this library take for granted; compiled as C++
// with LAYALIGN_EMULATE_CUDA, whether the software device does. Data come from a fixed sequence of random numbers.
// Prints a line per function. Exit status: 1 on a wrong result, with the function's name; 2 without a device.
#include "../cuda/launch.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace layalign::cuda {
namespace {

constexpr int kWords = 1 << 16;  // of input
constexpr int kOperands = 1 << 15, kSums = kOperands + 2 * 512;

struct Case {
  const uint32_t* in;  // random words; from kOperands on 512 pairs of small integers in fp16, in bf16, 512 in fp32
  uint32_t* found;
  uint32_t* expected;
};

// -- plain arithmetic -------------------------------------------------------------------------------------------------

DEVICE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x != x ? 0x7fc00000u : bits;  // all NaN are one
}
DEVICE uint32_t one_nan(uint32_t bits, uint32_t infinity_bits) {
  return (bits & 0x7fff) > infinity_bits ? 0x7fffu : bits;
}
DEVICE float value_of(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = static_cast<float>(exponent ? 1024 + mantissa : mantissa);
  for (int i = exponent ? exponent : 1; i < 25; ++i) size *= 0.5f;
  for (int i = 25; i < exponent; ++i) size *= 2.0f;
  if (exponent == 31) size = as_float(mantissa ? 0x7fc00000u : 0x7f800000u);
  return x.bits & 0x8000 ? -size : size;
}
DEVICE float value_of(BFloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE uint32_t infinity_of(Half) { return 0x7c00; }
DEVICE uint32_t infinity_of(BFloat) { return 0x7f80; }

// The nearest number of 16 bits, of two the even one.
template <typename T>
DEVICE uint32_t nearest(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000, infinite = infinity_of(T{});
  const float size = x < 0 ? -x : x;
  if (x != x) return 0x7fff;
  const auto value = [](uint32_t bits) { return value_of(T{static_cast<uint16_t>(bits)}); };
  uint32_t low = 0, high = infinite;  // value(low) <= size < value(high)
  if (size == as_float(0x7f800000)) return sign | infinite;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (value(middle) <= size ? low : high) = middle;
  }
  const float above = 2 * (size - value(low));
  const float gap = high == infinite ? value(low) - value(low - 1) : value(high) - value(low);
  return sign | (above > gap || (above == gap && low % 2) ? high : low);
}

// A random number of -4 to 4 in 16 bits.
DEVICE uint16_t small_number(uint32_t word, Half) {
  const uint16_t sizes[5] = {0, 0x3c00, 0x4000, 0x4200, 0x4400};
  return static_cast<uint16_t>(sizes[word % 5] | (word & 0x8000));
}
DEVICE uint16_t small_number(uint32_t word, BFloat) {
  const uint16_t sizes[5] = {0, 0x3f80, 0x4000, 0x4040, 0x4080};
  return static_cast<uint16_t>(sizes[word % 5] | (word & 0x8000));
}

DEVICE void put(const Case& c, int at, uint32_t found, uint32_t expected) {
  c.found[at] = found;
  c.expected[at] = expected;
}

// -- places and barriers ----------------------------------------------------------------------------------------------

__global__ void indices_kernel(KERNEL_PARAMETER Case c) {
  const int64_t block = block_index();
  const int at = static_cast<int>(block) * 96 + thread_index();
  put(c, 5 * at, static_cast<uint32_t>(thread_index()), static_cast<uint32_t>(at % 96));
  put(c, 5 * at + 1, static_cast<uint32_t>(lane_index()), static_cast<uint32_t>(at % 32));
  put(c, 5 * at + 2, static_cast<uint32_t>(warp_index()), static_cast<uint32_t>(at % 96 / 32));
  put(c, 5 * at + 3, static_cast<uint32_t>(block_count()), 3);
  put(c, 5 * at + 4, static_cast<uint32_t>(block), static_cast<uint32_t>(at / 96));
}

// A number goes round 8 times; in the last round every place has come from 8 threads before.
__global__ void sync_threads_kernel(KERNEL_PARAMETER Case c) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int i = thread_index();
  uint32_t mine = c.in[i];
  for (int round = 0; round < 8; ++round) {
    shared[i] = mine;
    sync_threads();
    mine = shared[(i + 1023) % 1024];
    sync_threads();
  }
  put(c, i, mine, c.in[(i + 1016) % 1024]);
}
__global__ void sync_warp_kernel(KERNEL_PARAMETER Case c) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory()) + 32 * warp_index();
  const int i = lane_index(), at = thread_index();
  uint32_t mine = c.in[at];
  for (int round = 0; round < 8; ++round) {
    shared[i] = mine;
    sync_warp();
    mine = shared[(i + 31) % 32];
    sync_warp();
  }
  put(c, at, mine, c.in[at / 32 * 32 + (i + 24) % 32]);
}
__global__ void shuffle_int_kernel(KERNEL_PARAMETER Case c) {
  for (int i = 0; i < 5; ++i) {
    const int found = shuffle_xor(static_cast<int>(c.in[lane_index()]), 1 << i);
    put(c, 32 * i + lane_index(), static_cast<uint32_t>(found), c.in[lane_index() ^ 1 << i]);
  }
}
__global__ void shuffle_float_kernel(KERNEL_PARAMETER Case c) {
  for (int i = 0; i < 5; ++i) {
    const float found = shuffle_xor(as_float(c.in[lane_index()] & 0x7effffff), 1 << i);
    put(c, 32 * i + lane_index(), as_bits(found), c.in[lane_index() ^ 1 << i] & 0x7effffff);
  }
}

// As much shared memory as the largest kernel asks for: every word is written by one thread and read by another.
constexpr int kSharedWords = 99 * 256;
__global__ void shared_memory_kernel(KERNEL_PARAMETER Case c) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = thread_index(); i < kSharedWords; i += 128) shared[i] = c.in[i];
  sync_threads();
  for (int i = 127 - thread_index(); i < kSharedWords; i += 128) put(c, i, shared[i], c.in[i]);
  if (thread_index() == 0) {
    put(c, kSharedWords, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(shared_memory()) % 128), 0);
  }
}

struct Large {
  Case c;
  uint32_t words[512];
};
__global__ void parameters_kernel(KERNEL_PARAMETER Large p) {
  const int i = thread_index();
  put(p.c, i, p.words[(i * 37 + p.c.in[0]) % 512], p.c.in[(i * 37 + p.c.in[0]) % 512]);
}

// -- copies -----------------------------------------------------------------------------------------------------------

// 8 copies of each thread are under way together, some of them absent; another thread reads each. Then the same places
// are used again.
__global__ void cp_async16_kernel(KERNEL_PARAMETER Case c) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int round = 0; round < 2; ++round) {
    const auto there = [&](int chunk) { return c.in[chunk + 1000 * round] % 3 != 0; };
    const auto from = [&](int chunk) { return 4 * ((chunk * 5 + round) % 1024); };
    for (int i = thread_index(); i < 1024; i += 128) {
      for (int k = 0; k < 4; ++k) shared[4 * i + k] = 0xdeadbeef;
    }
    sync_threads();
    for (int i = thread_index(); i < 1024; i += 128) {
      cp_async16(shared + 4 * i, there(i) ? c.in + from(i) : nullptr, there(i));
    }
    cp_async_wait();
    sync_threads();
    for (int i = 127 - thread_index(); i < 1024; i += 128) {
      const int to = 4 * (1024 * round + i);
      for (int k = 0; k < 4; ++k) put(c, to + k, shared[4 * i + k], there(i) ? c.in[from(i) + k] : 0);
    }
    sync_threads();
  }
}
__global__ void cp_async4_kernel(KERNEL_PARAMETER Case c) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = thread_index(); i < 1024; i += 128) cp_async4(shared + i, c.in + i * 3);
  cp_async_wait();
  sync_threads();
  for (int i = 127 - thread_index(); i < 1024; i += 128) put(c, i, shared[i], c.in[i * 3]);
}

// -- matrices ---------------------------------------------------------------------------------------------------------

// 32 rows of 8 numbers of 16 bits, 48 bytes apart; lane i points to row 7 i + 3 (mod 32).
template <bool TRANSPOSED>
DEVICE void check_ldmatrix(const Case& c) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const uint16_t* in = reinterpret_cast<const uint16_t*>(c.in);
  const int lane = lane_index();
  const auto row = [](int i) { return (7 * i + 3) % 32; };
  for (int k = 0; k < 8; ++k) shared[24 * lane + k] = in[8 * lane + k];
  sync_warp();
  uint32_t to[4];
  TRANSPOSED ? ldmatrix_transposed(to, shared + 24 * row(lane)) : ldmatrix(to, shared + 24 * row(lane));
  store_words(c.found + 4 * lane, Words4{{to[0], to[1], to[2], to[3]}});
  for (int m = 0; m < 4; ++m) {
    const auto element = [&](int r, int k) { return static_cast<uint32_t>(in[8 * row(8 * m + r) + k]); };
    const int major = lane / 4, minor = lane % 4 * 2;
    const uint32_t first = TRANSPOSED ? element(minor, major) : element(major, minor);
    const uint32_t second = TRANSPOSED ? element(minor + 1, major) : element(major, minor + 1);
    c.expected[4 * lane + m] = first | second << 16;
  }
}
__global__ void ldmatrix_kernel(KERNEL_PARAMETER Case c) { check_ldmatrix<false>(c); }
__global__ void ldmatrix_transposed_kernel(KERNEL_PARAMETER Case c) { check_ldmatrix<true>(c); }

// Small integers, so that every sum is exact in fp32 and only the places of elements matter; c up to 2^23. Row 5 of a
// has a NaN, row 6 an infinity, row 7 fp16's smallest subnormal number or bf16's smallest normal one, both no zeros.
template <typename T>
DEVICE void check_mma(const Case& c) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4 * 2;
  const auto a_bits = [&](int m, int k) {
    if (m == 5 && k == 9) return static_cast<uint16_t>(0x7fff);
    if (m == 6 && k == 3) return static_cast<uint16_t>(infinity_of(T{}));
    if (m == 7) return static_cast<uint16_t>(k != 2 ? 0 : infinity_of(T{}) == 0x7c00 ? 1 : 0x80);
    return small_number(c.in[16 * m + k], T{});
  };
  const auto b_bits = [&](int k, int n) {
    const uint16_t bits = small_number(c.in[256 + 8 * k + n], T{});
    return k == 3 && !(bits & 0x7fff) ? small_number(1, T{}) : bits;  // infinity times zero would be NaN
  };
  const auto c_value = [&](int m, int n) {
    return m == 7 ? 0.0f : static_cast<float>(static_cast<int>(c.in[512 + 8 * m + n] % (1 << 23)));
  };
  const auto pair = [](uint32_t first, uint32_t second) { return first | second << 16; };
  const auto a_pair = [&](int m, int k) { return pair(a_bits(m, k), a_bits(m, k + 1)); };
  const uint32_t a[4] = {a_pair(g, t), a_pair(g + 8, t), a_pair(g, t + 8), a_pair(g + 8, t + 8)};
  const uint32_t b0 = pair(b_bits(t, g), b_bits(t + 1, g)), b1 = pair(b_bits(t + 8, g), b_bits(t + 9, g));
  float sums[4] = {c_value(g, t), c_value(g, t + 1), c_value(g + 8, t), c_value(g + 8, t + 1)};
  mma(sums, a, b0, b1, T{});
  for (int i = 0; i < 4; ++i) {
    const int m = g + i / 2 * 8, n = t + i % 2;
    float sum = c_value(m, n);
    for (int k = 0; k < 16; ++k) sum += value_of(T{a_bits(m, k)}) * value_of(T{b_bits(k, n)});
    put(c, 8 * m + n, as_bits(sums[i]), as_bits(sum));
  }
}
// Operands as memory has them, in one load each: csrc/tests/compiled_ptx.py reads from the machine code that they reach the
// instruction in this order.
template <typename T>
DEVICE void check_mma_operands(const Case& c) {
  const int lane = lane_index();
  const uint32_t* in = c.in + kOperands + (infinity_of(T{}) == 0x7c00 ? 0 : 512);
  const Words4 a = load_words(in + 4 * lane), b = load_words(in + 128 + 4 * lane);
  const Words4 sums = load_words(c.in + kSums + 4 * lane);
  float found[4];
  memcpy(found, &sums, 16);
  mma(found, a.word, b.word[0], b.word[1], T{});
  Words4 stored;
  memcpy(&stored, found, 16);
  store_words(c.found + 4 * lane, stored);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(in);
  for (int i = 0; i < 4; ++i) {
    const int m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    float sum = as_float(sums.word[i]);
    for (int k = 0; k < 16; ++k) {
      const uint16_t x = halves[2 * (4 * (m % 8 * 4 + k % 8 / 2) + m / 8 + k / 8 * 2) + k % 2];
      const uint16_t y = halves[2 * (128 + 4 * (n * 4 + k % 8 / 2) + k / 8) + k % 2];
      sum += value_of(T{x}) * value_of(T{y});
    }
    c.expected[4 * lane + i] = as_bits(sum);
  }
}
__global__ void mma_half_operands_kernel(KERNEL_PARAMETER Case c) { check_mma_operands<Half>(c); }
__global__ void mma_bfloat_operands_kernel(KERNEL_PARAMETER Case c) { check_mma_operands<BFloat>(c); }
__global__ void mma_half_kernel(KERNEL_PARAMETER Case c) { check_mma<Half>(c); }
__global__ void mma_bfloat_kernel(KERNEL_PARAMETER Case c) { check_mma<BFloat>(c); }

// -- numbers ----------------------------------------------------------------------------------------------------------

// Random bits, and numbers beside the middle of two neighbours of 16 bits.
template <typename T>
DEVICE float number(const Case& c, int i) {
  const int dropped = infinity_of(T{}) == 0x7c00 ? 13 : 16;  // bits of fp32
  uint32_t bits = c.in[i];
  const uint32_t special[8] = {0, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 1, 0x80000001};
  if (i < 8) return as_float(special[i]);
  if (i % 4 == 0) return as_float(bits);
  const uint32_t middle = 1u << (dropped - 1), mask = (1u << dropped) - 1;
  const uint32_t low[4] = {0, middle - 1, middle, middle + 1};
  bits = (bits & ~mask) | low[i / 4 % 4];
  if (dropped == 13) bits = (bits & 0x807fffffu) | (101 + (bits >> 23 & 255) % 44) << 23;
  return as_float(bits);
}
template <typename T>
DEVICE void check_from_float(const Case& c) {
  for (int i = thread_index(); i < 8192; i += 128) {
    T x;
    from_float(&x, number<T>(c, i));
    put(c, i, one_nan(x.bits, infinity_of(T{})), nearest<T>(number<T>(c, i)));
  }
}
template <typename T>
DEVICE void check_pack(const Case& c) {
  const uint32_t infinite = infinity_of(T{});
  for (int i = thread_index(); i < 4096; i += 128) {
    const float first = number<T>(c, 2 * i), second = number<T>(c, 2 * i + 1);
    const uint32_t both = pack(first, second, T{});
    put(c, 2 * i, one_nan(both & 0xffff, infinite), nearest<T>(first));
    put(c, 2 * i + 1, one_nan(both >> 16, infinite), nearest<T>(second));
  }
}
template <typename T>
DEVICE void check_to_float(const Case& c) {
  for (int i = thread_index(); i < 65536; i += 128) {
    const T x{static_cast<uint16_t>(i)};
    put(c, i, as_bits(to_float(x)), as_bits(value_of(x)));
  }
}
__global__ void from_float_half_kernel(KERNEL_PARAMETER Case c) { check_from_float<Half>(c); }
__global__ void from_float_bfloat_kernel(KERNEL_PARAMETER Case c) { check_from_float<BFloat>(c); }
__global__ void pack_half_kernel(KERNEL_PARAMETER Case c) { check_pack<Half>(c); }
__global__ void pack_bfloat_kernel(KERNEL_PARAMETER Case c) { check_pack<BFloat>(c); }
__global__ void to_float_half_kernel(KERNEL_PARAMETER Case c) { check_to_float<Half>(c); }
__global__ void to_float_bfloat_kernel(KERNEL_PARAMETER Case c) { check_to_float<BFloat>(c); }
template <typename T>
DEVICE void check_pack_operands(const Case& c) {
  const int i = thread_index();
  const Float2 x = load_float2(c.in + kSums + 2 * i);
  put(c, i, pack(x.at[0], x.at[1], T{}), nearest<T>(x.at[0]) | nearest<T>(x.at[1]) << 16);
}
__global__ void pack_half_operands_kernel(KERNEL_PARAMETER Case c) { check_pack_operands<Half>(c); }
__global__ void pack_bfloat_operands_kernel(KERNEL_PARAMETER Case c) { check_pack_operands<BFloat>(c); }
__global__ void float_kernel(KERNEL_PARAMETER Case c) {
  const int i = thread_index();
  float x;
  from_float(&x, to_float(as_float(c.in[i] & 0x7effffff)));
  put(c, 2 * i, as_bits(x), c.in[i] & 0x7effffff);
  put(c, 2 * i + 1, as_bits(infinity()), 0x7f800000);
}

__global__ void halves_kernel(KERNEL_PARAMETER Case c) {
  const int i = thread_index();
  const uint32_t a = c.in[2 * i], b = c.in[2 * i + 1];
  put(c, 2 * i, lower_halves(a, b), a % 65536 + b % 65536 * 65536);
  put(c, 2 * i + 1, upper_halves(a, b), a / 65536 + b / 65536 * 65536);
}

__global__ void exp2_kernel(KERNEL_PARAMETER Case c) {
  for (int i = thread_index(); i < 4096; i += 128) {
    float x = static_cast<float>(c.in[i] % (1 << 22)) * 0x1p-14f - 150.0f;  // -150 to 106
    if (i < 256) x = static_cast<float>(i) - 150.0f;
    if (i == 256) x = -as_float(0x7f800000);
    if (i == 257) x = as_float(0x7f800000);
    if (i == 258) x = as_float(0x7fc00000);
    put(c, i, as_bits(exp2_fast(x)), as_bits(static_cast<float>(exp2(static_cast<double>(x)))));
  }
}
__global__ void log2_kernel(KERNEL_PARAMETER Case c) {
  for (int i = thread_index(); i < 4096; i += 128) {
    float x = as_float(c.in[i] & 0x7fffffff);
    if (i < 256) x = as_float(static_cast<uint32_t>(i) << 23);  // 0, powers of 2, infinity
    put(c, i, as_bits(log2_of(x)), as_bits(static_cast<float>(log2(static_cast<double>(x)))));
  }
}
__global__ void maximum_kernel(KERNEL_PARAMETER Case c) {
  for (int i = thread_index(); i < 4096; i += 128) {
    const float nan = as_float(0x7fc00000);
    const float a = i % 5 == 1 ? nan : as_float(c.in[i] & 0xfeffffff);
    const float b = i % 7 == 2 ? nan : as_float(c.in[i + 4096] & 0xfeffffff);
    put(c, i, as_bits(maximum(a, b)), as_bits(a != a ? b : b != b ? a : a > b ? a : b));
  }
}
// c is the rounded product: what one rounding leaves is the product's own error, and two leave 0.
__global__ void fused_kernel(KERNEL_PARAMETER Case c) {
  for (int i = thread_index(); i < 4096; i += 128) {
    const float a = 1.0f + static_cast<float>(c.in[i] % (1 << 23)) * 0x1p-23f;
    const float b = 1.0f + static_cast<float>(c.in[i + 4096] % (1 << 23)) * 0x1p-23f;
    const double product = static_cast<double>(a) * b;
    const float rounded = static_cast<float>(product);
    put(c, i, as_bits(fused(a, b, -rounded)), as_bits(static_cast<float>(product - rounded)));
  }
}

// -- wide loads and stores --------------------------------------------------------------------------------------------

__global__ void load_words_kernel(KERNEL_PARAMETER Case c) {
  const int at = 4 * (5 * thread_index() % 128);
  const Words4 x = load_words(c.in + at);
  for (int k = 0; k < 4; ++k) put(c, 4 * thread_index() + k, x.word[k], c.in[at + k]);
}
__global__ void load_words_cached_kernel(KERNEL_PARAMETER Case c) {
  const int at = 4 * (5 * thread_index() % 128);
  const Words4 x = load_words_cached(c.in + at);
  for (int k = 0; k < 4; ++k) put(c, 4 * thread_index() + k, x.word[k], c.in[at + k]);
}
__global__ void store_words_kernel(KERNEL_PARAMETER Case c) {
  const int at = 4 * thread_index();
  store_words(c.found + at, Words4{{c.in[at], c.in[at + 1], c.in[at + 2], c.in[at + 3]}});
  for (int k = 0; k < 4; ++k) c.expected[at + k] = c.in[at + k];
}
__global__ void store_pair_kernel(KERNEL_PARAMETER Case c) {
  const int at = 2 * thread_index();
  store_pair(c.found + at, c.in[at], c.in[at + 1]);
  for (int k = 0; k < 2; ++k) c.expected[at + k] = c.in[at + k];
}
DEVICE float plain_number(const Case& c, int i) { return as_float(c.in[i] & 0x7effffff); }
// Through shared memory: written by one thread and read by another.
__global__ void float4_kernel(KERNEL_PARAMETER Case c) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int at = 4 * thread_index(), other = 4 * (127 - thread_index());
  store_float4(shared + at, Float4{{plain_number(c, at), plain_number(c, at + 1), plain_number(c, at + 2),
                                    plain_number(c, at + 3)}});
  sync_threads();
  const Float4 x = load_float4(shared + other);
  for (int k = 0; k < 4; ++k) put(c, at + k, as_bits(x.at[k]), as_bits(plain_number(c, other + k)));
}
__global__ void float2_kernel(KERNEL_PARAMETER Case c) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int at = 2 * thread_index(), other = 2 * (127 - thread_index());
  store_float2(shared + at, Float2{{plain_number(c, at), plain_number(c, at + 1)}});
  sync_threads();
  const Float2 x = load_float2(shared + other);
  for (int k = 0; k < 2; ++k) put(c, at + k, as_bits(x.at[k]), as_bits(plain_number(c, other + k)));
}

// -- the host's side --------------------------------------------------------------------------------------------------

struct Memory {
  void* data = nullptr;
  explicit Memory(size_t bytes) {
#ifdef LAYALIGN_EMULATE_CUDA
    data = std::malloc(bytes);
#else
    check(cudaMalloc(&data, bytes), "cudaMalloc");
#endif
  }
  ~Memory() {
#ifdef LAYALIGN_EMULATE_CUDA
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};
void copy(void* to, const void* from, size_t bytes) {
#ifdef LAYALIGN_EMULATE_CUDA
  std::memcpy(to, from, bytes);
#else
  check(cudaDeviceSynchronize(), "a kernel");
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
#endif
}

const Launch kLaunch{0, nullptr};
bool failed = false;

struct Bench {
  std::vector<uint32_t> words;
  Memory in, found, expected;
  Case c;

  Bench() : words(kWords), in(4 * kWords), found(4 * kWords), expected(4 * kWords) {
    uint64_t state = 1;
    for (uint32_t& word : words) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      word = static_cast<uint32_t>(state >> 32);
    }
    for (int i = 0; i < 512; ++i) {
      const uint32_t word = words[kOperands + i], first = word & 0x80008000, low = word % 4, high = word >> 16 & 3;
      const uint32_t half[4] = {0, 0x3c00, 0x4000, 0x4200}, bfloat[4] = {0, 0x3f80, 0x4000, 0x4040};
      words[kOperands + i] = first | half[low] | half[high] << 16;
      words[kOperands + 512 + i] = first | bfloat[low] | bfloat[high] << 16;
      const float sum = static_cast<float>(static_cast<int>(words[kSums + i] % 1000) - 500);
      std::memcpy(&words[kSums + i], &sum, 4);
    }
    copy(in.data, words.data(), 4 * kWords);
    c = Case{static_cast<const uint32_t*>(in.data), static_cast<uint32_t*>(found.data),
             static_cast<uint32_t*>(expected.data)};
  }

  // `relative`, `absolute`: errors allowed, of floats; both 0: the same bits.
  template <typename Parameters>
  void run(const char* name, void (*kernel)(Parameters), const Parameters& parameters, int results, int threads = 128,
           int64_t blocks = 1, size_t shared = 0, double relative = 0, double absolute = 0) {
    const std::vector<uint32_t> poison(kWords, 0x7fbadbadu);
    std::vector<uint32_t> got(kWords), want(kWords);
    try {
      copy(found.data, poison.data(), 4 * kWords);
      copy(expected.data, poison.data(), 4 * kWords);
      queue(name, kernel, blocks, threads, shared, kLaunch, parameters);
      copy(got.data(), found.data, 4 * kWords);
      copy(want.data(), expected.data, 4 * kWords);
    } catch (const std::exception& error) {
      std::printf("WRONG %s: %s\n", name, error.what());
      failed = true;
      return;
    }
    for (int i = 0; i < results; ++i) {
      float one, other;
      std::memcpy(&one, &got[i], 4);
      std::memcpy(&other, &want[i], 4);
      const double error = std::fabs(static_cast<double>(one) - other);
      if (want[i] != poison[i] && got[i] == want[i]) continue;
      if (relative > 0 && error <= relative * std::fabs(static_cast<double>(other)) + absolute) continue;
      std::printf("WRONG %s: result %d is 0x%08x (%g), expected 0x%08x (%g)\n", name, i, got[i],
                  static_cast<double>(one), want[i], static_cast<double>(other));
      failed = true;
      return;
    }
    std::printf("%s: right\n", name);
  }
};

// No device gives a block more than 227 KB: the launch must fail, and the next one must not.
void refuse_shared(const Bench& bench) {
  try {
    queue("shared_memory", float2_kernel, 1, 128, 300 << 10, kLaunch, bench.c);
  } catch (const Error&) {
    std::printf("too much shared memory: refused\n");
    return;
  }
  std::printf("WRONG shared_memory: 300 KB were granted\n");
  failed = true;
}

void check_all() {
  Bench bench;
  const Case& c = bench.c;
  bench.run("indices", indices_kernel, c, 3 * 96 * 5, 96, 3);
  bench.run("sync_threads", sync_threads_kernel, c, 1024, 1024, 1, 4096);
  bench.run("sync_warp", sync_warp_kernel, c, 128, 128, 1, 512);
  bench.run("shuffle_xor of int", shuffle_int_kernel, c, 160, 32);
  bench.run("shuffle_xor of float", shuffle_float_kernel, c, 160, 32);
  bench.run("shared_memory", shared_memory_kernel, c, kSharedWords + 1, 128, 1, 4 * kSharedWords);
  refuse_shared(bench);
  Large large{c, {}};
  std::copy(bench.words.begin(), bench.words.begin() + 512, large.words);
  bench.run("kernel parameters", parameters_kernel, large, 128);
  bench.run("cp_async16", cp_async16_kernel, c, 8192, 128, 1, 16384);
  bench.run("cp_async4", cp_async4_kernel, c, 1024, 128, 1, 4096);
  bench.run("ldmatrix", ldmatrix_kernel, c, 128, 32, 1, 32 * 48);
  bench.run("ldmatrix_transposed", ldmatrix_transposed_kernel, c, 128, 32, 1, 32 * 48);
  bench.run("mma of Half", mma_half_kernel, c, 128, 32);
  bench.run("mma of BFloat", mma_bfloat_kernel, c, 128, 32);
  bench.run("mma of Half: operands", mma_half_operands_kernel, c, 128, 32);
  bench.run("mma of BFloat: operands", mma_bfloat_operands_kernel, c, 128, 32);
  bench.run("from_float to Half", from_float_half_kernel, c, 8192);
  bench.run("from_float to BFloat", from_float_bfloat_kernel, c, 8192);
  bench.run("pack of Half", pack_half_kernel, c, 8192);
  bench.run("pack of BFloat", pack_bfloat_kernel, c, 8192);
  bench.run("pack of Half: operands", pack_half_operands_kernel, c, 128);
  bench.run("pack of BFloat: operands", pack_bfloat_operands_kernel, c, 128);
  bench.run("to_float of Half", to_float_half_kernel, c, 65536);
  bench.run("to_float of BFloat", to_float_bfloat_kernel, c, 65536);
  bench.run("to_float, from_float of float, infinity", float_kernel, c, 256);
  bench.run("lower_halves, upper_halves", halves_kernel, c, 256);
  bench.run("exp2_fast", exp2_kernel, c, 4096, 128, 1, 0, 0x1p-22, 0x1p-126);  // subnormal results may be zero
  bench.run("log2_of", log2_kernel, c, 4096, 128, 1, 0, 0x1p-22);
  bench.run("maximum", maximum_kernel, c, 4096);
  bench.run("fused", fused_kernel, c, 4096);
  bench.run("load_words", load_words_kernel, c, 512);
  bench.run("load_words_cached", load_words_cached_kernel, c, 512);
  bench.run("store_words", store_words_kernel, c, 512);
  bench.run("store_pair", store_pair_kernel, c, 256);
  bench.run("load_float4, store_float4", float4_kernel, c, 512, 128, 1, 2048);
  bench.run("load_float2, store_float2", float2_kernel, c, 256, 128, 1, 1024);
}

}  // namespace
}  // namespace layalign::cuda

int main() {
#ifdef LAYALIGN_EMULATE_CUDA
  std::printf("device: emulated on the CPU\n");
#else
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(code));
    return 2;
  }
  cudaDeviceProp properties;
  layalign::cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("device: %s, sm_%d%d\n", properties.name, properties.major, properties.minor);
#endif
  try {
    layalign::cuda::check_all();
  } catch (const std::exception& error) {
    std::printf("WRONG memory: %s\n", error.what());
    return 1;
  }
  std::printf(layalign::cuda::failed ? "FAILED\n" : "all right\n");
  return layalign::cuda::failed;
}
