// Tiles of rows in shared memory, and products of them with accumulators in registers.
//
// A tile of T[ROWS][D] is divided into chunks of 16 bytes; chunk c of row r lies at c ^ (r % 8), so that 8 rows of one
// column of chunks never share banks. A warp has 16 rows of every product. Accumulators are laid out as mma.sync does:
// acc[n][i] is row lane / 4 + 8 * (i / 2), column 8 n + 2 * (lane % 4) + i % 2. The fp32 products keep that layout and
// compute it with fused multiply-adds, so that the kernels are the same for both.
#pragma once

#include "launch.cuh"

namespace layalign::cuda {

template <typename T>
HOST_DEVICE int chunk_size() {
  return 16 / static_cast<int>(sizeof(T));
}

// Elements from a tile's start to column `column` of row `row`.
template <typename T, int D>
DEVICE int at_swizzled(int row, int column) {
  constexpr int kChunk = chunk_size<T>();
  return row * D + ((column / kChunk) ^ (row & 7)) * kChunk + column % kChunk;
}

// Starts loading a tile. row(r) is the address of row r's `size` elements, or null for a row of zeros; elements
// after `size` become zero too. `vector`: rows are whole chunks and start on 16 bytes.
template <typename T, int D, int ROWS, int THREADS, typename Row>
DEVICE void load_tile(T* tile, int size, bool vector, Row row) {
  if (vector) {
    constexpr int kChunk = chunk_size<T>(), kChunks = D / kChunk, kStep = THREADS / kChunks;
    static_assert(THREADS % kChunks == 0 && ROWS % kStep == 0);
    const int first = thread_index() / kChunks, column = thread_index() % kChunks * kChunk;
    LAYALIGN_UNROLL
    for (int i = 0; i < ROWS / kStep; ++i) {
      const int r = first + i * kStep;
      const T* from = row(r);
      cp_async16(tile + at_swizzled<T, D>(r, column), from + (from ? column : 0), from && column < size);
    }
  } else {
    LAYALIGN_NO_UNROLL
    for (int i = thread_index(); i < ROWS * D; i += THREADS) {
      const int r = i / D, column = i % D;
      const T* from = column < size ? row(r) : nullptr;
      tile[at_swizzled<T, D>(r, column)] = from ? from[column] : T{};
    }
  }
}

// The same for rows that lie `stride` apart; rows with flags[r] != 0 are absent. Addresses are added, not multiplied.
template <typename T, int D, int ROWS, int THREADS>
DEVICE void load_tile(T* tile, int size, bool vector, const T* rows, int64_t stride, const float* flags) {
  if (vector) {
    constexpr int kChunk = chunk_size<T>(), kChunks = D / kChunk, kStep = THREADS / kChunks;
    static_assert(THREADS % kChunks == 0 && ROWS % kStep == 0);
    const int first = thread_index() / kChunks, column = thread_index() % kChunks * kChunk;
    const bool inside = column < size;
    const T* from = rows + first * stride + column;
    T* const same = tile + at_swizzled<T, D>(first, column);
    LAYALIGN_UNROLL
    for (int i = 0; i < ROWS / kStep; ++i) {
      const bool there = (flags[first + i * kStep] == 0.0f) & inside;
      T* to = kStep % 8 == 0 ? same + i * kStep * D : tile + at_swizzled<T, D>(first + i * kStep, column);
      cp_async16(to, from, there);
      from += kStep * stride;
    }
  } else {
    load_tile<T, D, ROWS, THREADS>(tile, size, false,
                                   [&](int r) { return flags[r] == 0.0f ? rows + r * stride : nullptr; });
  }
}

// -- fp16 and bf16: tensor cores --------------------------------------------------------------------------------------

// 16 rows of a tile as the left operand; KEEP: in registers, else read again for every product.
template <typename T, int D, bool KEEP>
struct LeftRows {
  uint32_t kept[KEEP ? D / 16 : 1][4];
  const T* tile;
  int first;

  DEVICE void set(const T* from, int row) {
    tile = from;
    first = row;
  }
  DEVICE void keep() {
    if constexpr (KEEP) {
      LAYALIGN_UNROLL
      for (int k = 0; k < D / 16; ++k) read(kept[k], k);
    }
  }
  DEVICE void read(uint32_t (&a)[4], int k) const {
    const int lane = lane_index();
    ldmatrix(a, tile + at_swizzled<T, D>(first + lane % 16, 16 * k + lane / 16 * 8));
  }
  DEVICE void get(uint32_t (&a)[4], int k) const {
    if constexpr (KEEP) {
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = kept[k][i];
    } else {
      read(a, k);
    }
  }
};

template <typename T, int D, int N, bool KEEP>
DEVICE void tensor_multiply_transposed(float (&acc)[N / 8][4], const LeftRows<T, D, KEEP>& left, const T* right,
                                       int first) {
  const int lane = lane_index(), row = first + lane % 8 + lane / 16 * 8, half = lane / 8 % 2 * 8;
  LAYALIGN_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    left.get(a, k);
    LAYALIGN_UNROLL
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      ldmatrix(b, right + at_swizzled<T, D>(row + 16 * n, 16 * k + half));
      mma(acc[2 * n], a, b[0], b[1], T{});
      mma(acc[2 * n + 1], a, b[2], b[3], T{});
    }
  }
}

template <typename T, int D, int N>
DEVICE void tensor_multiply(float (&acc)[D / 8][4], const float (&left)[N / 8][4], const T* right, int first) {
  const int lane = lane_index(), row = first + lane % 16, half = lane / 16 * 8;
  LAYALIGN_UNROLL
  for (int k = 0; k < N / 16; ++k) {
    const float(&low)[4] = left[2 * k];
    const float(&high)[4] = left[2 * k + 1];
    const uint32_t a[4] = {pack(low[0], low[1], T{}), pack(low[2], low[3], T{}), pack(high[0], high[1], T{}),
                           pack(high[2], high[3], T{})};
    LAYALIGN_UNROLL
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      ldmatrix_transposed(b, right + at_swizzled<T, D>(row + 16 * k, 16 * n + half));
      mma(acc[2 * n], a, b[0], b[1], T{});
      mma(acc[2 * n + 1], a, b[2], b[3], T{});
    }
  }
}

// -- fp32: fused multiply-adds ----------------------------------------------------------------------------------------

template <int D, bool KEEP>
struct LeftRows<float, D, KEEP> {
  const float* tile;
  int first;

  DEVICE void set(const float* from, int row) {
    tile = from;
    first = row;
  }
  DEVICE void keep() {}
};

DEVICE float dot(const Float4& a, const Float4& b, float c) {
  c = fused(a.at[0], b.at[0], c);
  c = fused(a.at[1], b.at[1], c);
  c = fused(a.at[2], b.at[2], c);
  return fused(a.at[3], b.at[3], c);
}

template <int D, int N, bool KEEP>
DEVICE void plain_multiply_transposed(float (&acc)[N / 8][4], const LeftRows<float, D, KEEP>& left, const float* right,
                                      int first) {
  const int lane = lane_index(), row = left.first + lane / 4, column = first + lane % 4 * 2;
  LAYALIGN_NO_UNROLL
  for (int chunk = 0; chunk < D; chunk += 16) {  // a sum of sums rounds less than one long sum
    float part[N / 8][4] = {};
    LAYALIGN_NO_UNROLL
    for (int k = chunk; k < chunk + 16; k += 4) {
      const Float4 a0 = load_float4(left.tile + at_swizzled<float, D>(row, k));
      const Float4 a1 = load_float4(left.tile + at_swizzled<float, D>(row + 8, k));
      LAYALIGN_UNROLL
      for (int n = 0; n < N / 8; ++n) {
        LAYALIGN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Float4 b = load_float4(right + at_swizzled<float, D>(column + 8 * n + i, k));
          part[n][i] = dot(a0, b, part[n][i]);
          part[n][2 + i] = dot(a1, b, part[n][2 + i]);
        }
      }
    }
    LAYALIGN_UNROLL
    for (int n = 0; n < N / 8; ++n) {
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) acc[n][i] += part[n][i];
    }
  }
}

// `scratch`: this warp's 16 x (N + 4) numbers, through which the left operand's rows reach all lanes.
template <int D, int N>
DEVICE void plain_multiply(float (&acc)[D / 8][4], const float (&left)[N / 8][4], const float* right, int first,
                           float* scratch) {
  const int lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
  sync_warp();
  LAYALIGN_UNROLL
  for (int n = 0; n < N / 8; ++n) {
    store_float2(scratch + row * (N + 4) + 8 * n + column, Float2{{left[n][0], left[n][1]}});
    store_float2(scratch + (row + 8) * (N + 4) + 8 * n + column, Float2{{left[n][2], left[n][3]}});
  }
  sync_warp();
  LAYALIGN_NO_UNROLL
  for (int s = 0; s < N; ++s) {
    const float a0 = scratch[row * (N + 4) + s], a1 = scratch[(row + 8) * (N + 4) + s];
    LAYALIGN_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const Float2 b = load_float2(right + at_swizzled<float, D>(first + s, 8 * n + column));
      acc[n][0] = fused(a0, b.at[0], acc[n][0]);
      acc[n][1] = fused(a0, b.at[1], acc[n][1]);
      acc[n][2] = fused(a1, b.at[0], acc[n][2]);
      acc[n][3] = fused(a1, b.at[1], acc[n][3]);
    }
  }
}

// -- either -----------------------------------------------------------------------------------------------------------

// acc (16 x N) += left (16 x D) right^T, right: rows first .. first + N - 1 of a tile.
template <typename T, int D, int N, bool KEEP>
DEVICE void multiply_transposed(float (&acc)[N / 8][4], const LeftRows<T, D, KEEP>& left, const T* right, int first) {
  if constexpr (sizeof(T) == 2) {
    tensor_multiply_transposed<T, D, N>(acc, left, right, first);
  } else {
    plain_multiply_transposed<D, N>(acc, left, right, first);
  }
}

// acc (16 x D) += left (16 x N, rounded to T) right, right: rows first .. first + N - 1 of a tile.
template <typename T, int D, int N>
DEVICE void multiply(float (&acc)[D / 8][4], const float (&left)[N / 8][4], const T* right, int first,
                     [[maybe_unused]] float* scratch) {
  if constexpr (sizeof(T) == 2) {
    tensor_multiply<T, D, N>(acc, left, right, first);
  } else {
    plain_multiply<D, N>(acc, left, right, first, scratch);
  }
}

// -- results ----------------------------------------------------------------------------------------------------------

// A warp's 16 rows to a tile of fp32[16][D] in shared memory, swizzled, from which whole rows can be stored.
template <int D>
DEVICE void stage(float* to, const float (&acc)[D / 8][4]) {
  const int lane = lane_index(), row = lane / 4, column = lane % 4 * 2;
  LAYALIGN_UNROLL
  for (int n = 0; n < D / 8; ++n) {
    store_float2(to + at_swizzled<float, D>(row, 8 * n + column), Float2{{acc[n][0], acc[n][1]}});
    store_float2(to + at_swizzled<float, D>(row + 8, 8 * n + column), Float2{{acc[n][2], acc[n][3]}});
  }
}

// 4 neighbouring numbers of a row of `size`; `vector`: rows start on a multiple of 4 numbers.
template <typename T>
DEVICE void store4(T* row, int column, int size, bool vector, const Float4& x) {
  if (vector) {
    if (column < size) store_pair(row + column, pack(x.at[0], x.at[1], T{}), pack(x.at[2], x.at[3], T{}));
    return;
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < size) from_float(row + column + i, x.at[i]);
  }
}
DEVICE void store4(float* row, int column, int size, bool vector, const Float4& x) {
  if (vector) {
    if (column < size) store_float4(row + column, x);
    return;
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < size) row[column + i] = x.at[i];
  }
}

// Stores ROWS staged rows times `factor`. row(r) is the address of row r, or null for one that does not exist.
template <typename T, int D, int ROWS, int THREADS, typename Row>
DEVICE void store_staged(const float* staged, float factor, int size, bool vector, Row row) {
  LAYALIGN_NO_UNROLL
  for (int i = thread_index(); i < ROWS * D / 4; i += THREADS) {
    const int r = i / (D / 4), column = i % (D / 4) * 4;
    T* to = row(r);
    if (!to || column >= size) continue;
    Float4 x = load_float4(staged + at_swizzled<float, D>(r, column));
    LAYALIGN_UNROLL
    for (int k = 0; k < 4; ++k) x.at[k] *= factor;
    store4(to, column, size, vector, x);
  }
}

}  // namespace layalign::cuda
