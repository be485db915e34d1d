// Layer mix in fp16 and bf16 on tensor cores, without shared memory for the states.
//
// x (J x columns) = relu(W (J x E) h (E x columns) + bias), for tiles of 64 columns of one row, a warp each. Per column
// 2 J E FLOP and 2 (E + J) bytes; at E 24, J 64 that is 17 FLOP a byte, so memory is the limit. Gradient of the weight:
// as many FLOP, 2 (2 J + E) bytes; of the states: likewise, with E written instead of read.
//
// mma.sync needs pairs of layers side by side in a register, but memory has a layer's columns side by side. The order
// of columns in a fragment is free, so a lane loads 8 columns (16 bytes) of four layers, and column i of its 8 goes to
// product i. Byte permutes then form the pairs of layers, a lane's results of the 8 products are 8 neighbouring
// columns, and stores are 16 bytes wide again.
#include "layer_mix.cuh"

namespace layalign::cuda {
namespace {

constexpr int kWarps = kMixThreads / 32;

// Which of a tile's 8 blocks of 8 columns a place of a fragment stands for: a quad's stores are then 64 bytes wide.
DEVICE int column_block(int place) { return place / 2 + place % 2 * 4; }

// The bits of g where x > 0 (not NaN), else zero; two numbers at a time.
DEVICE uint32_t where_positive(uint32_t g, uint32_t x, uint32_t infinity_bits) {
  const uint32_t low = (x & 0xffffu) - 1u < infinity_bits ? 0xffffu : 0u;
  const uint32_t high = (x >> 16) - 1u < infinity_bits ? 0xffff0000u : 0u;
  return g & (low | high);
}
DEVICE uint32_t infinity_bits(Half) { return 0x7c00u; }
DEVICE uint32_t infinity_bits(BFloat) { return 0x7f80u; }

template <typename T>
DEVICE Words4 load_grad(const T* grad, const T* x, int64_t column, int64_t width, bool vector) {
  Words4 g = load8(grad, column, width, vector);
  const Words4 xs = load8(x, column, width, vector);
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) g.word[i] = where_positive(g.word[i], xs.word[i], infinity_bits(T{}));
  return g;
}

// B fragments of the 8 products of one step of 16 layers, from 8 columns of the four layers of this lane.
DEVICE void fragments(uint32_t (&b)[8][2], const Words4 (&h)[4]) {
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[2 * i][0] = lower_halves(h[0].word[i], h[1].word[i]);
    b[2 * i][1] = lower_halves(h[2].word[i], h[3].word[i]);
    b[2 * i + 1][0] = upper_halves(h[0].word[i], h[1].word[i]);
    b[2 * i + 1][1] = upper_halves(h[2].word[i], h[3].word[i]);
  }
}

// Writes rows lane / 4 and lane / 4 + 8 of 8 accumulated products, whose columns are as described above.
template <typename T>
DEVICE void store_tile(T* out, int64_t slot_stride, int first, int count, int64_t column, int64_t width, bool vector,
                       const float (&acc)[8][4]) {
  const int lane = lane_index();
  LAYALIGN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int j = first + lane / 4 + 8 * half;
    if (j >= count) continue;
    LAYALIGN_UNROLL
    for (int e = 0; e < 2; ++e) {
      Words4 x;
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) x.word[i] = pack(acc[2 * i][2 * half + e], acc[2 * i + 1][2 * half + e], T{});
      store8(out + j * slot_stride, column + 8 * (lane % 4 + 4 * e), width, vector, x);
    }
  }
}

struct Source {
  const void* data;
  int64_t stride_b, stride_s;
};

// Weight (rows x cols, or its transpose) as fragments' rows in shared memory, zero outside.
template <typename T>
DEVICE void stage_weight(T* to, int pitch, int rows, int cols, bool transposed, const MixParameters& p) {
  for (int i = thread_index(); i < rows * cols; i += kMixThreads) {
    const int r = i / cols, c = i % cols;
    const int j = transposed ? c : r, e = transposed ? r : c;
    const bool inside = j < p.slots && e < p.layers_count;
    from_float(to + r * pitch + c, inside ? load_any(p.weight, j * p.weight_stride + e, p.weight_dtype) : 0.0f);
  }
}
DEVICE void stage_layers(Source* to, int count, const MixParameters& p) {
  for (int e = thread_index(); e < count; e += kMixThreads) {
    const bool inside = e < p.layers_count;
    to[e] = inside ? Source{p.layers.data[e], p.layers.stride_b[e], p.layers.stride_s[e]} : Source{nullptr, 0, 0};
  }
}

HOST_DEVICE int weight_pitch(int columns) { return columns + 8; }  // 16 bytes more: no two rows in the same banks

constexpr size_t forward_shared(int steps, int slots) {
  const size_t padded = static_cast<size_t>(ceil_div(slots, 16) * 16);
  return 16 * static_cast<size_t>(steps) * sizeof(Source) + padded * sizeof(float) +
         padded * static_cast<size_t>(weight_pitch(16 * steps)) * 2;
}

// STEPS steps of 16 layers each.
template <typename T, int STEPS>
__global__ void __launch_bounds__(kMixThreads) forward_kernel(KERNEL_PARAMETER MixParameters p) {
  constexpr int kPitch = weight_pitch(16 * STEPS);
  const int padded = (p.slots + 15) / 16 * 16;
  Source* layers = reinterpret_cast<Source*>(shared_memory());
  float* bias = reinterpret_cast<float*>(layers + 16 * STEPS);
  T* weight = reinterpret_cast<T*>(bias + padded);
  stage_layers(layers, 16 * STEPS, p);
  stage_weight(weight, kPitch, padded, 16 * STEPS, false, p);
  for (int j = thread_index(); j < padded; j += kMixThreads) {
    bias[j] = p.bias && j < p.slots ? load_any(p.bias, j, p.bias_dtype) : 0.0f;
  }
  sync_threads();
  const int lane = lane_index();
  const uint32_t end = tiles_end(p), begin = static_cast<uint32_t>(block_index()) * p.per_block;
  for (uint32_t tile = begin + static_cast<uint32_t>(warp_index()); tile < end; tile += kWarps) {
    const Place at = place_of(tile, kMixColumns, p);
    const int64_t column = at.column + 8 * column_block(lane / 4);
    uint32_t b[STEPS][8][2];
    LAYALIGN_UNROLL
    for (int k = 0; k < STEPS; ++k) {
      Words4 h[4];
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Source source = layers[16 * k + 2 * (lane % 4) + i % 2 + i / 2 * 8];
        const T* from = static_cast<const T*>(source.data) + at.b * source.stride_b + at.s * source.stride_s;
        h[i] = source.data ? load8(from, column, p.width, p.vector_hidden) : Words4{{0, 0, 0, 0}};
      }
      fragments(b[k], h);
    }
    LAYALIGN_NO_UNROLL
    for (int j = 0; j < padded; j += 16) {
      float acc[8][4];
      const float bias_low = bias[j + lane / 4], bias_high = bias[j + lane / 4 + 8];
      LAYALIGN_UNROLL
      for (int n = 0; n < 8; ++n) {
        acc[n][0] = acc[n][1] = bias_low;
        acc[n][2] = acc[n][3] = bias_high;
      }
      LAYALIGN_UNROLL
      for (int k = 0; k < STEPS; ++k) {
        uint32_t a[4];
        ldmatrix(a, weight + (j + lane % 16) * kPitch + 16 * k + lane / 16 * 8);
        LAYALIGN_UNROLL
        for (int n = 0; n < 8; ++n) mma(acc[n], a, b[k][n][0], b[k][n][1], T{});
      }
      LAYALIGN_UNROLL
      for (int n = 0; n < 8; ++n) {
        LAYALIGN_UNROLL
        for (int i = 0; i < 4; ++i) acc[n][i] = acc[n][i] < 0.0f ? 0.0f : acc[n][i];  // NaN stays NaN
      }
      T* out = static_cast<T*>(p.out) + at.row * p.width;
      store_tile(out, p.rows * p.width, j, p.slots, at.column, p.width, p.vector_out, acc);
    }
  }
}

constexpr size_t hidden_shared(int tiles, int slots) {
  return 16 * static_cast<size_t>(tiles) * static_cast<size_t>(weight_pitch(ceil_div(slots, 16) * 16)) * 2;
}

// dhidden (E x columns) = W^T (E x J) g (J x columns): the same with other operands; TILES tiles of 16 layers.
template <typename T, int TILES>
__global__ void __launch_bounds__(kMixThreads) hidden_kernel(KERNEL_PARAMETER MixParameters p) {
  const int padded = (p.slots + 15) / 16 * 16, pitch = weight_pitch(padded);
  T* weight = reinterpret_cast<T*>(shared_memory());
  stage_weight(weight, pitch, 16 * TILES, padded, true, p);
  sync_threads();
  const int lane = lane_index();
  const uint32_t end = tiles_end(p), begin = static_cast<uint32_t>(block_index()) * p.per_block;
  for (uint32_t tile = begin + static_cast<uint32_t>(warp_index()); tile < end; tile += kWarps) {
    const Place at = place_of(tile, kMixColumns, p);
    const int64_t column = at.column + 8 * column_block(lane / 4);
    const T* grad = static_cast<const T*>(p.grad) + at.b * p.grad_b + at.s * p.grad_s;
    const T* x = static_cast<const T*>(p.x) + at.row * p.width;
    float acc[TILES][8][4] = {};
    LAYALIGN_NO_UNROLL
    for (int k = 0; k < padded; k += 16) {
      Words4 g[4];
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = k + 2 * (lane % 4) + i % 2 + i / 2 * 8;
        g[i] = Words4{{0, 0, 0, 0}};
        if (j < p.slots) {
          g[i] = load_grad(grad + j * p.grad_j, x + j * (p.rows * p.width), column, p.width, p.vector_grad);
        }
      }
      uint32_t b[8][2];
      fragments(b, g);
      LAYALIGN_UNROLL
      for (int m = 0; m < TILES; ++m) {
        uint32_t a[4];
        ldmatrix(a, weight + (16 * m + lane % 16) * pitch + k + lane / 16 * 8);
        LAYALIGN_UNROLL
        for (int n = 0; n < 8; ++n) mma(acc[m][n], a, b[n][0], b[n][1], T{});
      }
    }
    T* out = static_cast<T*>(p.out) + at.row * p.width;
    LAYALIGN_UNROLL
    for (int m = 0; m < TILES; ++m) {
      store_tile(out, p.rows * p.width, 16 * m, p.layers_count, at.column, p.width, p.vector_out, acc[m]);
    }
  }
}

// dweight (16 slots x E), dbias: a warp sums over every parts-th tile of 64 columns of a row. The sum over columns may
// run in any order, so both operands are loaded in memory order, 16 bytes at a time: a lane's 8 columns are two steps
// of the products. The bias is a product with ones. TILES tiles of 8 layers.
template <typename T, int TILES>
__global__ void __launch_bounds__(kMixThreads) weight_kernel(KERNEL_PARAMETER MixParameters p) {
  Source* layers = reinterpret_cast<Source*>(shared_memory());
  stage_layers(layers, 8 * TILES, p);
  sync_threads();
  const int lane = lane_index(), slot_tiles = (p.slots + 15) / 16;
  const uint32_t unit = static_cast<uint32_t>(block_index() * kWarps + warp_index());
  const uint32_t part = unit / static_cast<uint32_t>(slot_tiles);
  const int j = static_cast<int>(unit - part * static_cast<uint32_t>(slot_tiles)) * 16 + lane / 4;
  if (part >= p.parts) return;
  const uint32_t ones = pack(1.0f, 1.0f, T{});
  float acc[TILES][4] = {}, total[4] = {};
  LAYALIGN_NO_UNROLL
  for (uint32_t tile = part; tile < p.tiles; tile += p.parts) {
    const Place at = place_of(tile, kMixColumns, p);
    const T* grad = static_cast<const T*>(p.grad) + at.b * p.grad_b + at.s * p.grad_s;
    const T* x = static_cast<const T*>(p.x) + at.row * p.width;
    LAYALIGN_UNROLL
    for (int part32 = 0; part32 < 2; ++part32) {
      const int64_t column = at.column + 32 * part32 + 8 * (lane % 4);
      Words4 g[2], h[TILES];
      LAYALIGN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int slot = j + 8 * i;
        g[i] = Words4{{0, 0, 0, 0}};
        if (slot < p.slots) {
          g[i] = load_grad(grad + slot * p.grad_j, x + slot * (p.rows * p.width), column, p.width, p.vector_grad);
        }
      }
      LAYALIGN_UNROLL
      for (int n = 0; n < TILES; ++n) {
        const Source source = layers[8 * n + lane / 4];
        const T* from = static_cast<const T*>(source.data) + at.b * source.stride_b + at.s * source.stride_s;
        h[n] = Words4{{0, 0, 0, 0}};
        if (source.data && p.vector_hidden) {
          if (column < p.width) h[n] = load_words_cached(from + column);
        } else if (source.data) {
          h[n] = load8(from, column, p.width, false);
        }
      }
      LAYALIGN_UNROLL
      for (int k = 0; k < 2; ++k) {
        const uint32_t a[4] = {g[0].word[2 * k], g[1].word[2 * k], g[0].word[2 * k + 1], g[1].word[2 * k + 1]};
        LAYALIGN_UNROLL
        for (int n = 0; n < TILES; ++n) mma(acc[n], a, h[n].word[2 * k], h[n].word[2 * k + 1], T{});
        mma(total, a, ones, ones, T{});
      }
    }
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int slot = j + i / 2 * 8;
    if (slot >= p.slots) continue;
    float* to = p.partial + (static_cast<int64_t>(part) * p.slots + slot) * (p.layers_count + 1);
    LAYALIGN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      const int e = 8 * n + 2 * (lane % 4) + i % 2;
      if (e < p.layers_count) to[e] = acc[n][i];
    }
    if (lane % 4 == 0 && i % 2 == 0) to[p.layers_count] = total[i];
  }
}

int64_t tiled_blocks(const MixParameters& p) { return ceil_div<int64_t>(p.tiles, p.per_block); }

template <typename T>
void forward(const MixParameters& p, Launch launch) {
  const int steps = p.layers_count <= 16 ? 1 : p.layers_count <= 32 ? 2 : 4;
  auto* kernel = steps == 1 ? forward_kernel<T, 1> : steps == 2 ? forward_kernel<T, 2> : forward_kernel<T, 4>;
  queue("layer_mix", kernel, tiled_blocks(p), kMixThreads, forward_shared(steps, p.slots), launch, p);
}
template <typename T>
void hidden(const MixParameters& p, Launch launch) {
  const int tiles = p.layers_count <= 32 ? 2 : 4;
  auto* kernel = tiles == 2 ? hidden_kernel<T, 2> : hidden_kernel<T, 4>;
  queue("layer_mix", kernel, tiled_blocks(p), kMixThreads, hidden_shared(tiles, p.slots), launch, p);
}
template <typename T>
void weight(const MixParameters& p, Launch launch) {
  const int tiles = p.layers_count <= 16 ? 2 : p.layers_count <= 32 ? 4 : 8;
  auto* kernel = tiles == 2 ? weight_kernel<T, 2> : tiles == 4 ? weight_kernel<T, 4> : weight_kernel<T, 8>;
  const int64_t units = static_cast<int64_t>(p.parts) * ceil_div(p.slots, 16);
  const size_t shared = 8 * static_cast<size_t>(tiles) * sizeof(Source);
  queue("layer_mix", kernel, ceil_div<int64_t>(units, kWarps), kMixThreads, shared, launch, p);
}

}  // namespace

void mix_forward_half(const MixParameters& p, DType dtype, Launch launch) {
  dtype == DType::float16 ? forward<Half>(p, launch) : forward<BFloat>(p, launch);
}
void mix_hidden_half(const MixParameters& p, DType dtype, Launch launch) {
  dtype == DType::float16 ? hidden<Half>(p, launch) : hidden<BFloat>(p, launch);
}
void mix_weight_half(const MixParameters& p, DType dtype, Launch launch) {
  dtype == DType::float16 ? weight<Half>(p, launch) : weight<BFloat>(p, launch);
}

}  // namespace layalign::cuda
