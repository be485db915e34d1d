// Shared by all kernels: widening to float, copying rows to tiles, and the matrix product that they are made of.
//
// multiply() is C[i, :] = sum_k A[i, k] * B[k, :] on registers: lanes run over B's columns, A's numbers are broadcast,
// and a tile of C (6 x 4 registers with AVX-512) stays in registers for the whole sum. Per step of k a tile loads 4
// registers and 6 numbers for 24 multiply-adds, so the arithmetic hides the loads. The order of each sum over k is
// fixed and the same for every tile shape: a row's bits do not depend on its neighbours.
#pragma once

#include <cstdlib>

#include "../layalign.h"
#include "parallel.h"
#include "simd.h"

namespace layalign::cpu::LAYALIGN_ISA {

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t ceil_div(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Floats on the heap for the length of a call.
struct Scratch {
  explicit Scratch(int64_t count) : data(static_cast<float*>(allocate(count * 4))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data;
};

// -- tensors ----------------------------------------------------------------------------------------------------------

static inline int64_t element_size(DType type) {
  return type == DType::float32 ? 4 : type == DType::boolean ? 1 : 2;
}

static inline char* at(const Tensor& x, int64_t i, int64_t j = 0, int64_t k = 0) {
  return static_cast<char*>(x.data) + (i * x.stride[0] + j * x.stride[1] + k * x.stride[2]) * element_size(x.dtype);
}

template <typename T>
static inline void widen_as(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load_first(from + i, count - i));
}

// `count` numbers as float, then zeros up to a whole register.
static inline void widen(DType type, const void* from, int64_t count, float* to) {
  if (type == DType::float32) widen_as(static_cast<const float*>(from), count, to);
  else if (type == DType::bfloat16) widen_as(static_cast<const BFloat*>(from), count, to);
  else widen_as(static_cast<const Half*>(from), count, to);
}

template <typename T>
static inline void narrow_as(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load(from + i), count - i);
}

// The other way; `from` can be read up to a whole register.
static inline void narrow(DType type, const float* from, int64_t count, void* to) {
  if (type == DType::float32) narrow_as(from, count, static_cast<float*>(to));
  else if (type == DType::bfloat16) narrow_as(from, count, static_cast<BFloat*>(to));
  else narrow_as(from, count, static_cast<Half*>(to));
}

// The same times `factor`, which changes `from`.
static inline void narrow_scaled(DType type, float* from, int64_t count, float factor, void* to) {
  if (type != DType::float32) {
    for (int64_t i = 0; i < count; i += kLanes) store(from + i, load(from + i) * factor);
    return narrow(type, from, count, to);
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(static_cast<float*>(to) + i, load(from + i) * factor);
  if (i < count) store_first(static_cast<float*>(to) + i, load(from + i) * factor, count - i);
}

static inline void zero_row(const Tensor& x, int64_t count, void* to) {  // zero has no bits set in any type
  memset(to, 0, static_cast<size_t>(count * element_size(x.dtype)));
}

static inline float number(const Tensor& x, int64_t i = 0) {
  const void* from = static_cast<const char*>(x.data) + i * element_size(x.dtype);
  if (x.dtype == DType::float32) return *static_cast<const float*>(from);
  if (x.dtype == DType::bfloat16) return to_float(*static_cast<const BFloat*>(from));
  return to_float(*static_cast<const Half*>(from));
}

// -- rows of floats ---------------------------------------------------------------------------------------------------

static inline const float* floats(const Tensor& x) { return static_cast<const float*>(x.data); }

static inline bool finite(Vec sum) {  // x - x is NaN for what is not finite
  const Vec none = sum - sum;
  return largest(none == none ? Vec{} : splat(1.0f)) == 0;
}

// (rows, columns), rows `row` apart, to its transpose (columns, step), padded with zeros to whole registers. Returns
// whether all of it is finite.
static inline bool transpose(const float* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t step) {
  Vec seen{};  // 0 * x is NaN for what is not finite, and NaN stays
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t wide = smaller(kLanes, columns - c);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const float* at = from + (r + i) * row + c;
        square[i] = r + i >= rows ? Vec{} : wide == kLanes ? load(at) : load_first(at, wide);
        seen += square[i] * 0.0f;
      }
      transpose(square);
      for (int64_t i = 0; i < wide; ++i) store(to + (c + i) * step + r, square[i]);
    }
  }
  return finite(seen);
}

// The same copied to rows that are `step` apart.
static inline bool copy_rows(const float* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t step) {
  Vec seen{};
  for (int64_t r = 0; r < rows; ++r, from += row, to += step) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec value = c + kLanes <= columns ? load(from + c) : load_first(from + c, columns - c);
      seen += value * 0.0f;
      store(to + c, value);
    }
  }
  return finite(seen);
}

// `count` numbers as registers, the last one filled up with zeros.
static inline void load_row(const float* from, int64_t count, Vec* to) {
  for (int64_t c = 0; c < count; c += kLanes) {
    to[c / kLanes] = c + kLanes <= count ? load(from + c) : load_first(from + c, count - c);
  }
}

// -- the product ------------------------------------------------------------------------------------------------------

// A[i, k] = data[i * row + k * step]
struct Left {
  const float* data;
  int64_t row, step;
};
// B[k, :] = data + k * step
struct Right {
  const float* data;
  int64_t step;
};

// Where C starts from and where it goes. first(i, column) and last(i, column, value) are called once per register.
struct Overwrite {
  float* data;
  int64_t row;
  Vec first(int64_t, int64_t) const { return Vec{}; }
  void last(int64_t i, int64_t column, Vec value) const { store(data + i * row + column, value); }
};
// The earlier sum is added at the end, not at the start: a sum of sums is more exact than one long sum.
struct Accumulate {
  float* data;
  int64_t row;
  Vec first(int64_t, int64_t) const { return Vec{}; }
  void last(int64_t i, int64_t column, Vec value) const {
    float* to = data + i * row + column;
    store(to, load(to) + value);
  }
};

template <int kRows, int kVecs, typename Out>
static inline __attribute__((always_inline)) void multiply_tile(
    int64_t row, int64_t column, int64_t depth, const Left& a, const Right& b, const Out& out) {
  Vec total[kRows][kVecs];
  LAYALIGN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) total[i][v] = out.first(row + i, column + v * kLanes);
  }
  const float* left = a.data + row * a.row;
  const float* right = b.data + column;
  for (int64_t k = 0; k < depth; ++k, left += a.step, right += b.step) {
    Vec loaded[kVecs];
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) loaded[v] = load(right + v * kLanes);
    LAYALIGN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec one = splat(left[i * a.row]);
      LAYALIGN_UNROLL
      for (int v = 0; v < kVecs; ++v) total[i][v] += one * loaded[v];
    }
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) out.last(row + i, column + v * kLanes, total[i][v]);
  }
}

constexpr int kPanel = kRegisters == 32 ? 4 : kLanes == 8 ? 3 : 2;  // registers across a tile, at most

// Rows of a tile that is `vecs` registers wide.
constexpr int tile_rows(int vecs) {
  return kRegisters == 32 ? (vecs == 4 ? 6 : 8) : vecs == 3 ? 4 : vecs == 2 ? (kLanes == 8 ? 6 : 4) : 8;
}

template <int kVecs, typename Out>
static void multiply_panel(int64_t rows, int64_t column, int64_t depth, Left a, Right b, const Out& out) {
  constexpr int kRows = tile_rows(kVecs);
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) multiply_tile<kRows, kVecs>(i, column, depth, a, b, out);
  if constexpr (kRows > 4) {
    if (i + 4 <= rows) multiply_tile<4, kVecs>(i, column, depth, a, b, out), i += 4;
  }
  if (i + 2 <= rows) multiply_tile<2, kVecs>(i, column, depth, a, b, out), i += 2;
  if (i < rows) multiply_tile<1, kVecs>(i, column, depth, a, b, out);
}

// C: (rows, vecs * kLanes), A: (rows, depth), B: (depth, vecs * kLanes).
template <typename Out>
static void multiply(int64_t rows, int64_t vecs, int64_t depth, Left a, Right b, const Out& out) {
  const int64_t panels = ceil_div(vecs, kPanel);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t begin = vecs * p / panels, width = vecs * (p + 1) / panels - begin, column = begin * kLanes;
    if (width == 1) multiply_panel<1>(rows, column, depth, a, b, out);
    else if (width == 2) multiply_panel<2>(rows, column, depth, a, b, out);
    else if constexpr (kPanel >= 3) {
      if (width == 3) multiply_panel<3>(rows, column, depth, a, b, out);
      else if constexpr (kPanel >= 4) multiply_panel<4>(rows, column, depth, a, b, out);
    }
  }
}

// C = A B into (rows, vecs * kLanes) floats, the sums over a long depth taken in parts.
static inline void multiply_deep(int64_t rows, int64_t vecs, int64_t depth, Left a, const Right& b, float* to) {
  constexpr int64_t kDepth = 64;
  const int64_t row = vecs * kLanes;
  multiply(rows, vecs, smaller(depth, kDepth), a, b, Overwrite{to, row});
  for (int64_t k = kDepth; k < depth; k += kDepth) {
    const Left left{a.data + k * a.step, a.row, a.step};
    multiply(rows, vecs, smaller(depth - k, kDepth), left, Right{b.data + k * b.step, b.step}, Accumulate{to, row});
  }
}

}  // namespace layalign::cpu::LAYALIGN_ISA
