// Shared by the layer mix kernels for half and for single precision.
#pragma once

#include "launch.cuh"

namespace layalign::cuda {

// Addresses of the encoder's layers, passed by value: nothing is copied to the device beforehand.
struct Layers {
  const void* data[kMaxLayers];
  int64_t stride_b[kMaxLayers];
  int64_t stride_s[kMaxLayers];
};

struct MixParameters {
  Layers layers;
  int layers_count;  // E
  int slots;         // J
  int64_t rows;      // B * S
  uint32_t source;   // S
  int64_t width;     // D
  const void* weight;
  int64_t weight_stride;  // over J
  DType weight_dtype;
  const void* bias;
  DType bias_dtype;
  void* out;          // (J, rows, D), or (E, rows, D) for the hidden states' gradient
  const void* grad;   // (J, B, S, D)
  int64_t grad_j, grad_b, grad_s;
  const void* x;      // (J, rows, D)
  float* partial;     // [parts][J][E + 1], the bias last
  float* dweight;
  float* dbias;
  uint32_t parts;
  uint32_t columns;    // tiles of a row
  uint32_t tiles;      // rows * columns
  uint32_t per_block;  // tiles
  bool vector_hidden, vector_grad, vector_out;  // 16-byte accesses; `grad` speaks for x too
};

constexpr int kMixThreads = 128;
constexpr int kMixColumns = 64;        // of a tile in half precision, and of every tile of the weight's gradient
constexpr int kMixColumnsFloat = 128;  // of a tile in single precision

// A tile's place: which of the B * S rows, its b and s, and the first column. Divisions in 32 bits, offsets in 64.
struct Place {
  int64_t row, b, s, column;
};
DEVICE Place place_of(uint32_t tile, int width, const MixParameters& p) {
  const uint32_t row = tile / p.columns, b = row / p.source;
  return Place{row, b, row - b * p.source, static_cast<int64_t>(tile - row * p.columns) * width};
}
// The end of this block's tiles.
DEVICE uint32_t tiles_end(const MixParameters& p) {
  const uint32_t end = (static_cast<uint32_t>(block_index()) + 1) * p.per_block;
  return end < p.tiles ? end : p.tiles;
}

// 8 numbers of 16 bits from column `column`; zero after the last column.
template <typename T>
DEVICE Words4 load8(const T* row, int64_t column, int64_t width, bool vector) {
  Words4 x{{0, 0, 0, 0}};
  if (vector) return column < width ? load_words(row + column) : x;
  LAYALIGN_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = column + i < width ? row[column + i].bits : 0;
    x.word[i / 2] |= bits << (16 * (i % 2));
  }
  return x;
}

template <typename T>
DEVICE void store8(T* row, int64_t column, int64_t width, bool vector, const Words4& x) {
  if (vector) {
    if (column < width) store_words(row + column, x);
    return;
  }
  LAYALIGN_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (column + i < width) row[column + i].bits = static_cast<uint16_t>(x.word[i / 2] >> (16 * (i % 2)));
  }
}

// Launches, by file. `dtype` is that of the hidden states.
void mix_forward_half(const MixParameters& p, DType dtype, Launch launch);
void mix_hidden_half(const MixParameters& p, DType dtype, Launch launch);
void mix_weight_half(const MixParameters& p, DType dtype, Launch launch);
void mix_forward_float(const MixParameters& p, Launch launch);
void mix_hidden_float(const MixParameters& p, Launch launch);
void mix_weight_float(const MixParameters& p, Launch launch);

}  // namespace layalign::cuda
