// Layer mix in fp32: plain fused multiply-adds (no TF32) from tiles in shared memory.
//
// Forward and dhidden are one product (M x K) @ (K x 128 columns) per tile, with M = J, K = E and M = E, K = J. A lane
// has 4 columns, a warp 8 or 16 rows; the weight lies transposed in shared memory: a warp reads it as one broadcast.
#include "layer_mix.cuh"

namespace layalign::cuda {
namespace {

constexpr int kDepth = 64;  // rows of a tile of states: all layers at once, or a quarter of the slots

HOST_DEVICE int padded_rows(bool backward, int rows) {
  const int step = backward ? 64 : 32;
  return (rows + step - 1) / step * step;
}

// 4 numbers from column `column`; zero after the last one.
DEVICE Float4 load4(const float* row, int64_t column, int64_t width, bool vector) {
  Float4 x{{0.0f, 0.0f, 0.0f, 0.0f}};
  if (vector) {
    if (column < width) x = load_float4(row + column);
    return x;
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) x.at[i] = column + i < width ? row[column + i] : 0.0f;
  return x;
}
DEVICE void store4(float* row, int64_t column, int64_t width, bool vector, const Float4& x) {
  if (vector) {
    if (column < width) store_float4(row + column, x);
    return;
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (column + i < width) row[column + i] = x.at[i];
  }
}

// 4 columns of layer e, or of the gradient of slot e where it passes the relu; zero after the last layer or slot.
DEVICE Float4 load_layer(const MixParameters& p, int e, const Place& at, int64_t column) {
  if (e >= p.layers_count) return Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
  const float* from = static_cast<const float*>(p.layers.data[e]);
  return load4(from + at.b * p.layers.stride_b[e] + at.s * p.layers.stride_s[e], column, p.width, p.vector_hidden);
}
DEVICE Float4 load_grad(const MixParameters& p, int j, const Place& at, int64_t column) {
  if (j >= p.slots) return Float4{{0.0f, 0.0f, 0.0f, 0.0f}};
  const float* grad = static_cast<const float*>(p.grad) + j * p.grad_j + at.b * p.grad_b + at.s * p.grad_s;
  const float* x = static_cast<const float*>(p.x) + (j * p.rows + at.row) * p.width;
  Float4 g = load4(grad, column, p.width, p.vector_grad);
  const Float4 xs = load4(x, column, p.width, p.vector_grad);
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) g.at[i] = xs.at[i] > 0.0f ? g.at[i] : 0.0f;
  return g;
}

template <bool BACKWARD>
__global__ void __launch_bounds__(kMixThreads) mix_kernel(KERNEL_PARAMETER MixParameters p) {
  constexpr int kRows = BACKWARD ? 16 : 8;  // of a warp at a time: all 64 layers at once in the backward
  constexpr int kStep = kRows * (kMixThreads / 32);
  const int rows = BACKWARD ? p.layers_count : p.slots, depth = BACKWARD ? p.slots : p.layers_count;
  const int padded = padded_rows(BACKWARD, rows);
  float* states = reinterpret_cast<float*>(shared_memory());  // [min(depth, kDepth)][kMixColumnsFloat]
  float* weight = states + (depth < kDepth ? depth : kDepth) * kMixColumnsFloat;  // [depth][padded]
  for (int i = thread_index(); i < depth * padded; i += kMixThreads) {
    const int k = i / padded, m = i % padded, j = BACKWARD ? k : m, e = BACKWARD ? m : k;
    weight[i] = m < rows ? load_any(p.weight, j * p.weight_stride + e, p.weight_dtype) : 0.0f;
  }
  const int lane = lane_index();
  const uint32_t end = tiles_end(p);
  for (uint32_t tile = static_cast<uint32_t>(block_index()) * p.per_block; tile < end; ++tile) {
    const Place at = place_of(tile, kMixColumnsFloat, p);
    const int64_t column = at.column + 4 * lane;
    for (int first = 0; first < rows; first += kStep) {
      const int m = first + warp_index() * kRows;
      float acc[kRows][4];
      LAYALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const bool biased = !BACKWARD && p.bias && m + r < rows;
        const float bias = biased ? load_any(p.bias, m + r, p.bias_dtype) : 0.0f;
        acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = bias;
      }
      for (int k0 = 0; k0 < depth; k0 += kDepth) {
        const int count = depth - k0 < kDepth ? depth - k0 : kDepth;
        if (first == 0 || depth > kDepth) {
          sync_threads();
          for (int k = warp_index(); k < count; k += kMixThreads / 32) {
            const Float4 x = BACKWARD ? load_grad(p, k0 + k, at, column) : load_layer(p, k, at, column);
            store_float4(states + k * kMixColumnsFloat + 4 * lane, x);
          }
          sync_threads();
        }
        LAYALIGN_NO_UNROLL
        for (int k = 0; k < count; ++k) {
          const Float4 x = load_float4(states + k * kMixColumnsFloat + 4 * lane);
          LAYALIGN_UNROLL
          for (int r = 0; r < kRows; r += 4) {
            const Float4 w = load_float4(weight + (k0 + k) * padded + m + r);
            LAYALIGN_UNROLL
            for (int i = 0; i < 16; ++i) acc[r + i / 4][i % 4] = fused(w.at[i / 4], x.at[i % 4], acc[r + i / 4][i % 4]);
          }
        }
      }
      LAYALIGN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (m + r >= rows) continue;
        Float4 x;
        LAYALIGN_UNROLL
        for (int i = 0; i < 4; ++i) x.at[i] = !BACKWARD && acc[r][i] < 0.0f ? 0.0f : acc[r][i];  // NaN stays NaN
        store4(static_cast<float*>(p.out) + ((m + r) * p.rows + at.row) * p.width, column, p.width, p.vector_out, x);
      }
    }
  }
}

constexpr int kSlots = 32, kPitch = kMixColumns + 4;

// dweight, dbias of 32 slots: a block sums over every parts-th tile of 64 columns of a row; a thread has 4 x 4 sums.
__global__ void __launch_bounds__(kMixThreads) weight_kernel(KERNEL_PARAMETER MixParameters p) {
  float* grad = reinterpret_cast<float*>(shared_memory());  // [kSlots][kPitch]
  float* states = grad + kSlots * kPitch;                   // [kMaxLayers][kPitch]
  const int slot_tiles = (p.slots + kSlots - 1) / kSlots;
  const uint32_t part = static_cast<uint32_t>(block_index()) / static_cast<uint32_t>(slot_tiles);
  const int slot = static_cast<int>(block_index() - static_cast<int64_t>(part) * slot_tiles) * kSlots;
  const int j = thread_index() / 16, e = thread_index() % 16;  // slots j + 8 a, layers e + 16 b
  float acc[4][4] = {}, total[4] = {};
  for (uint32_t tile = part; tile < p.tiles; tile += p.parts) {
    const Place at = place_of(tile, kMixColumns, p);
    sync_threads();
    for (int i = thread_index(); i < (kSlots + kMaxLayers) * 16; i += kMixThreads) {
      const int r = i / 16, c = i % 16 * 4;
      const Float4 x = r < kSlots ? load_grad(p, slot + r, at, at.column + c)
                                  : load_layer(p, r - kSlots, at, at.column + c);
      store_float4(grad + r * kPitch + c, x);
    }
    sync_threads();
    LAYALIGN_NO_UNROLL
    for (int c = 0; c < kMixColumns; c += 4) {
      Float4 g[4], h[4];
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        g[i] = load_float4(grad + (j + 8 * i) * kPitch + c);
        h[i] = load_float4(states + (e + 16 * i) * kPitch + c);
        total[i] += (g[i].at[0] + g[i].at[1]) + (g[i].at[2] + g[i].at[3]);
      }
      LAYALIGN_UNROLL
      for (int i = 0; i < 64; ++i) {
        acc[i / 16][i / 4 % 4] = fused(g[i / 16].at[i % 4], h[i / 4 % 4].at[i % 4], acc[i / 16][i / 4 % 4]);
      }
    }
  }
  LAYALIGN_UNROLL
  for (int a = 0; a < 4; ++a) {
    const int to_slot = slot + j + 8 * a;
    if (to_slot >= p.slots) continue;
    float* to = p.partial + (static_cast<int64_t>(part) * p.slots + to_slot) * (p.layers_count + 1);
    LAYALIGN_UNROLL
    for (int b = 0; b < 4; ++b) {
      if (e + 16 * b < p.layers_count) to[e + 16 * b] = acc[a][b];
    }
    if (e == 0) to[p.layers_count] = total[a];
  }
}

template <bool BACKWARD>
void mix(const MixParameters& p, Launch launch) {
  const int rows = BACKWARD ? p.layers_count : p.slots, depth = BACKWARD ? p.slots : p.layers_count;
  const int states = (depth < kDepth ? depth : kDepth) * kMixColumnsFloat;
  const size_t shared = static_cast<size_t>(states + depth * padded_rows(BACKWARD, rows)) * sizeof(float);
  queue("layer_mix", mix_kernel<BACKWARD>, ceil_div<int64_t>(p.tiles, p.per_block), kMixThreads, shared, launch, p);
}

}  // namespace

void mix_forward_float(const MixParameters& p, Launch launch) { mix<false>(p, launch); }
void mix_hidden_float(const MixParameters& p, Launch launch) { mix<true>(p, launch); }
void mix_weight_float(const MixParameters& p, Launch launch) {
  const size_t shared = (kSlots + kMaxLayers) * kPitch * sizeof(float);
  const int64_t blocks = static_cast<int64_t>(p.parts) * ceil_div(p.slots, kSlots);
  queue("layer_mix", weight_kernel, blocks, kMixThreads, shared, launch, p);
}

}  // namespace layalign::cuda
