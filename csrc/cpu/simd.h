// One register of floats, as wide as the instruction set this file is compiled for, and what the kernels do with it.
//
// Every kernel file is compiled once per instruction set, each time into its own namespace (LAYALIGN_ISA), and
// dispatch.cpp picks one at run time. Such files must not use inline functions of the standard library: the linker
// keeps one copy of those, and it could be one that this machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef LAYALIGN_ISA
#error "LAYALIGN_ISA names the instruction set that this file is compiled for"
#endif

namespace layalign::cpu::LAYALIGN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

#if defined(__clang__)
#define LAYALIGN_UNROLL _Pragma("unroll")
#else
#define LAYALIGN_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

// Raw 16-bit numbers; the two differ only in how they are read.
struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

static inline Vec splat(float value) { return value - Vec{}; }

// -- one number ------------------------------------------------------------------------------------------------------

static inline float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint32_t as_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

static inline float to_float(float value) { return value; }
static inline float to_float(BFloat value) { return as_float(uint32_t(value.bits) << 16); }
static inline float to_float(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // infinity, NaN
  // 2^112 moves the exponent's bias from 15 to 127 and turns subnormal halves into normal floats on the way.
  return as_float(as_bits(as_float(rest << 13) * as_float(0x77800000)) | sign);
#endif
}

static inline void from_float(float* to, float value) { *to = value; }
static inline void from_float(BFloat* to, float value) {
  uint32_t bits = as_bits(value);
  if (value != value) { to->bits = 0x7fc0; return; }
  to->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
static inline void from_float(Half* to, float value) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(value, 0);
#else
  uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) { to->bits = uint16_t(sign | 0x7e00); return; }
  if (rest >= 0x477ff000) { to->bits = uint16_t(sign | 0x7c00); return; }  // 65520 and more round to infinity
  if (rest < 0x38800000) {  // subnormal in half: the addition rounds at the right place
    uint32_t sum = as_bits(as_float(rest) + 0.5f);
    to->bits = uint16_t(sign | (sum - 0x3f000000));
    return;
  }
  rest += 0xfff + (rest >> 13 & 1);
  to->bits = uint16_t(sign | ((rest - 0x38000000) >> 13));
#endif
}

// -- a register -------------------------------------------------------------------------------------------------------

static inline Vec load(const float* from) { Vec value; memcpy(&value, from, sizeof value); return value; }
static inline void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }

static inline Vec load(const BFloat* from) {
  HalfVec raw;
  memcpy(&raw, from, sizeof raw);
  BitVec bits = __builtin_convertvector(raw, BitVec) << 16;
  Vec value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline void store(BFloat* to, Vec value) {
  BitVec bits;
  memcpy(&bits, &value, sizeof bits);
  BitVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  BitVec nan = (BitVec)(value != value);
  HalfVec raw = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), HalfVec);
  memcpy(to, &raw, sizeof raw);
}

static inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));  // gcc warns about the other
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__ARM_NEON)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from)));
#else
  Vec value{};
  for (int i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
  return value;
#endif
}
static inline void store(Half* to, Vec value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)value, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, 0));
#elif defined(__ARM_NEON)
  vst1_u16((uint16_t*)to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)value)));
#else
  for (int i = 0; i < kLanes; ++i) from_float(to + i, value[i]);
#endif
}

// The first `count` < kLanes numbers; the others are zero, or left as they are in memory.
#if defined(__AVX512F__)
static inline Vec load_first(const float* from, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
static inline void store_first(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)value);
}
#endif
template <typename T>
static inline Vec load_first(const T* from, int64_t count) {
  T buffer[kLanes] = {};
#if defined(__AVX512F__)
  __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  memcpy(buffer, &raw, sizeof raw);
#else
  memcpy(buffer, from, sizeof(T) * static_cast<size_t>(count));
#endif
  return load(buffer);
}
template <typename T>
static inline void store_first(T* to, Vec value, int64_t count) {
  T buffer[kLanes];
  store(buffer, value);
#if defined(__AVX512F__)
  __m256i raw;
  memcpy(&raw, buffer, sizeof raw);
  _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), raw);
#else
  memcpy(to, buffer, sizeof(T) * static_cast<size_t>(count));
#endif
}

// Stores that bypass the caches, for results too large to stay there. `to` is a multiple of kStreamBytes.
constexpr int kStreamBytes = 64;
static inline void stream(float* to, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)value);
#else
  store(to, value);
#endif
}
template <typename T>
static inline void stream(T* to, Vec value) {
#if defined(__AVX512F__)
  T buffer[kLanes];
  store(buffer, value);
  _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)buffer));
#elif defined(__AVX2__)
  T buffer[kLanes];
  store(buffer, value);
  _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)buffer));
#else
  store(to, value);
#endif
}
static inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec relu(Vec a) { return a < 0 ? Vec{} : a; }  // NaN stays NaN, as in torch

static inline float sum(Vec a) {  // in pairs: fast, and more exact than one by one
  float parts[kLanes];
  store(parts, a);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) parts[i] += parts[i + step];
  }
  return parts[0];
}
static inline float largest(Vec a) {
  float found = a[0];
  for (int i = 1; i < kLanes; ++i) found = a[i] > found ? a[i] : found;
  return found;
}

// 2^x for x <= 0 (softmax's only case) to 1.5 ulp; below -126.5 it is 0, NaN stays NaN. 2^x = 2^n 2^f, n the nearest
// integer: adding 1.5 * 2^23 leaves n in the low bits, and 2^f is a minimax polynomial on [-0.5, 0.5] (error 2e-9).
static inline Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f;
  x = x < -127.0f ? splat(-127.0f) : x;
  Vec shifted = x + kRound;
  Vec f = x - (shifted - kRound);
  Vec p = f * 0x1.41db4cp-13f + 0x1.5f46eap-10f;
  p = p * f + 0x1.3b2db2p-7f;
  p = p * f + 0x1.c6aed0p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  BitVec bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  Vec power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

// -- several registers ------------------------------------------------------------------------------------------------

template <int kStep, int... I>
static inline Vec low_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {  // a0 b0 a2 b2 ..., blocks of kStep
  return __builtin_shufflevector(a, b, ((I & kStep) ? I - kStep + kLanes : I)...);
}
template <int kStep, int... I>
static inline Vec high_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {  // a1 b1 a3 b3 ...
  return __builtin_shufflevector(a, b, ((I & kStep) ? I + kLanes : I + kStep)...);
}
template <int kStep, int... I>
static inline Vec mixed_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {  // a0 b1 a2 b3 ...
  return __builtin_shufflevector(a, b, ((I & kStep) ? I + kLanes : I)...);
}
template <int kStep, int... I>
static inline Vec crossed_blocks(Vec a, Vec b, std::integer_sequence<int, I...>) {  // a1 b0 a3 b2 ...
  return __builtin_shufflevector(a, b, ((I & kStep) ? I - kStep + kLanes : I + kStep)...);
}
using Lanes = std::make_integer_sequence<int, kLanes>;

// Lane i of the result is the sum over the lanes of x[i].
template <int kStep = kLanes / 2>
static inline Vec sum_each(Vec* x) {
  LAYALIGN_UNROLL
  for (int i = 0; i < kStep; ++i) {
    x[i] = mixed_blocks<kStep>(x[i], x[i + kStep], Lanes{}) + crossed_blocks<kStep>(x[i], x[i + kStep], Lanes{});
  }
  if constexpr (kStep > 1) return sum_each<kStep / 2>(x);
  return x[0];
}

// The kLanes x kLanes matrix with rows x[i], transposed in place.
template <int kStep = kLanes / 2>
static inline void transpose(Vec* x) {
  LAYALIGN_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    Vec low = low_blocks<kStep>(x[i], x[i + kStep], Lanes{});
    x[i + kStep] = high_blocks<kStep>(x[i], x[i + kStep], Lanes{});
    x[i] = low;
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(x);
}

}  // namespace layalign::cpu::LAYALIGN_ISA
