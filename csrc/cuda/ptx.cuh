// The hardware instructions of the kernels: indices, barriers, shuffles, cp.async, ldmatrix, mma.sync, conversions.
//
// This is the only header with two versions. The one below is PTX (sm_80 and up); with LAYALIGN_EMULATE_CUDA the
// same functions come from emulate.h and the kernels run on the CPU.
#pragma once

#include <cstdint>

namespace layalign::cuda {

// Raw 16-bit numbers; the two differ only in how they are read.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(16) Float4 {
  float at[4];
};
struct alignas(8) Float2 {
  float at[2];
};

}  // namespace layalign::cuda

#ifdef LAYALIGN_EMULATE_CUDA
#include "emulate.h"
#define LAYALIGN_UNROLL
#define LAYALIGN_NO_UNROLL
#else
#include <cuda_runtime.h>
#define LAYALIGN_UNROLL _Pragma("unroll")
#define LAYALIGN_NO_UNROLL _Pragma("unroll 1")
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ constexpr
#define KERNEL_PARAMETER const __grid_constant__

namespace layalign::cuda {

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
DEVICE int64_t block_index() { return blockIdx.x; }
DEVICE int64_t block_count() { return gridDim.x; }

DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char layalign_shared[];
  return layalign_shared;
}
DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Asynchronous copies of 16 or 4 bytes from global to shared memory, or zeros stored at once. Predicated, because a
// branch per copy costs more than the copy, and so does the form with a variable size.
DEVICE void cp_async16(void* to, const void* from, bool there) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\n"
      "@there cp.async.cg.shared.global [%0], [%1], 16;\n"
      "@!there st.shared.v4.u32 [%0], {%3, %3, %3, %3};\n}" ::"r"(shared_address(to)),
      "l"(from), "r"(static_cast<uint32_t>(there)), "r"(0)
      : "memory");
}
DEVICE void cp_async4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DEVICE void ldmatrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8); the last argument only names the type.
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to about 22 bits; 0 for -inf, NaN for NaN.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_of(float x) { return log2f(x); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

DEVICE void from_float(float* to, float x) { *to = x; }
DEVICE void from_float(Half* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
DEVICE void from_float(BFloat* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }

// Two numbers in one register, the first in the lower half.
DEVICE uint32_t pack(float first, float second, Half) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
DEVICE uint32_t pack(float first, float second, BFloat) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
// The lower (upper) halves of two registers side by side.
DEVICE uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// 16 aligned bytes of global memory that are read once.
DEVICE Words4 load_words(const void* from) {
  Words4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(from));
  return x;
}
// The same for what neighbouring warps read too.
DEVICE Words4 load_words_cached(const void* from) {
  const uint4 x = __ldg(static_cast<const uint4*>(from));
  return Words4{{x.x, x.y, x.z, x.w}};
}
DEVICE void store_words(void* to, const Words4& x) {
  *static_cast<uint4*>(to) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
DEVICE Float4 load_float4(const void* shared) {
  const float4 x = *static_cast<const float4*>(shared);
  return Float4{{x.x, x.y, x.z, x.w}};
}
DEVICE Float2 load_float2(const void* shared) {
  const float2 x = *static_cast<const float2*>(shared);
  return Float2{{x.x, x.y}};
}
DEVICE void store_float4(void* to, const Float4& x) {
  *static_cast<float4*>(to) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
}
DEVICE void store_float2(void* to, const Float2& x) { *static_cast<float2*>(to) = make_float2(x.at[0], x.at[1]); }
DEVICE void store_pair(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}
DEVICE float infinity() { return __int_as_float(0x7f800000); }

}  // namespace layalign::cuda
#endif
