// Shared by the kernels of gated cross-attention: parameters, packed rows, and the stream of keys and values.
//
// The query heads of a group and their T rows are packed into H / G * T rows, head by head, that share keys and values;
// a block has some of these rows. Scores are kept in base 2: scale * log2(e) is in `scale2`.
#pragma once

#include "tiles.cuh"

namespace layalign::cuda {

struct AttentionParameters {
  const void* query;
  const void* key;
  const void* value;
  const void* gate;
  const void* residual;
  const void* grad;
  const unsigned char* mask;
  int64_t query_b, query_h, query_t, key_b, key_g, key_s, value_b, value_g, value_s;
  int64_t residual_b, residual_t, residual_h, grad_b, grad_t, grad_h, mask_b, mask_s;
  int heads, groups, repeat, length, source, size;  // H, G, H / G, T, S, d
  int rows;                                         // repeat * T
  int tiles;                                        // blocks of rows of a group, or blocks of the source
  Divisor by_length, by_groups, by_tiles, by_splits;
  float scale, scale2;
  DType gate_dtype, residual_dtype;
  bool vector_query, vector_source, vector_grad, vector_out, vector_part;
  int splits, span;  // parts of the source and their length, or parts of the rows and their number of tiles
  void* out;         // (B, T, H, d)
  float* lse;        // (B, H, T)
  int64_t part_rows;  // B * T * H, or B * G * S in the backward
  float* part;       // [splits][B * T * H][d], the parts' results
  float* part_lse;   // [splits][B * T * H]
  // Backward.
  float* delta;    // (B, H, T), or absent
  float* inverse;  // likewise; fp32 only: 1 / the recomputed probabilities' sum
  float* dgate_part;
  void* dquery;
  void* dkey;
  void* dvalue;
  int64_t dquery_b, dquery_h, dquery_t, dkey_b, dkey_g, dkey_s, dvalue_b, dvalue_g, dvalue_s;
  bool vector_dquery, vector_dkey, vector_dvalue;
  float* dkey_part;    // [splits][B * G * S][d]
  float* dvalue_part;  // likewise
};

// Row i of the packed rows of group g.
struct PackedRow {
  int head, t;
};
DEVICE PackedRow packed_row(const AttentionParameters& p, int g, int i) {
  const int r = static_cast<int>(p.by_length.divide(static_cast<uint32_t>(i)));
  return PackedRow{g * p.repeat + r, i - r * p.length};
}
template <typename T>
DEVICE const T* query_row(const AttentionParameters& p, int64_t b, int g, int i) {
  if (i >= p.rows) return nullptr;
  const PackedRow at = packed_row(p, g, i);
  return static_cast<const T*>(p.query) + b * p.query_b + at.head * p.query_h + at.t * p.query_t;
}
template <typename T>
DEVICE const T* grad_row(const AttentionParameters& p, int64_t b, int g, int i) {
  if (i >= p.rows) return nullptr;
  const PackedRow at = packed_row(p, g, i);
  return static_cast<const T*>(p.grad) + b * p.grad_b + at.t * p.grad_t + at.head * p.grad_h;
}
// Index of packed row 0 in (B, H, T) tensors; packed rows lie side by side there.
DEVICE int64_t first_packed(const AttentionParameters& p, int64_t b, int g) {
  return (b * p.heads + static_cast<int64_t>(g) * p.repeat) * p.length;
}

// What a block works on. Splits of a tile are neighbours, then tiles of a group, because they read the same data.
struct BlockPlace {
  int64_t b;
  int g, tile, split;
};
DEVICE BlockPlace block_place(const AttentionParameters& p) {
  const uint32_t block = static_cast<uint32_t>(block_index());
  const uint32_t tiles = p.by_splits.divide(block), groups = p.by_tiles.divide(tiles), b = p.by_groups.divide(groups);
  return BlockPlace{b, static_cast<int>(groups - b * p.by_groups.divisor),
                    static_cast<int>(tiles - groups * p.by_tiles.divisor),
                    static_cast<int>(block - tiles * p.by_splits.divisor)};
}
// On the host, when groups, tiles and splits are known.
inline void set_divisors(AttentionParameters& p) {
  p.by_length = Divisor(static_cast<uint32_t>(p.length));
  p.by_groups = Divisor(static_cast<uint32_t>(p.groups));
  p.by_tiles = Divisor(static_cast<uint32_t>(p.tiles));
  p.by_splits = Divisor(static_cast<uint32_t>(p.splits));
}

struct Range {
  int first, end;
};

// [first, end) without the padding at either end; all threads call it. `scratch`: two ints a warp.
template <int THREADS>
DEVICE Range attended_range(const unsigned char* mask, int64_t stride, int first, int end, int* scratch) {
  if (!mask || end <= first) return Range{first, end};
  int low = end, high = first;
  for (int s = first + thread_index(); s < end; s += THREADS) {
    if (mask[s * stride]) {
      low = s < low ? s : low;
      high = s + 1;
    }
  }
  LAYALIGN_UNROLL
  for (int i = 16; i; i /= 2) {
    const int other_low = shuffle_xor(low, i), other_high = shuffle_xor(high, i);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (lane_index() == 0) {
    scratch[2 * warp_index()] = low;
    scratch[2 * warp_index() + 1] = high;
  }
  sync_threads();
  LAYALIGN_UNROLL
  for (int w = 0; w < THREADS / 32; ++w) {
    low = scratch[2 * w] < low ? scratch[2 * w] : low;
    high = scratch[2 * w + 1] > high ? scratch[2 * w + 1] : high;
  }
  return Range{low, high > low ? high : low};
}

// Tiles of BN keys and values of one (b, g), one after another, STAGES of them in shared memory: [STAGES][2][BN][D].
// Tokens under a false mask are zero there, whatever lies in memory.
template <typename T, int D, int BN, int STAGES, int THREADS>
struct SourceStream {
  static_assert(BN <= THREADS && (STAGES == 1 || STAGES == 2));
  T* tiles;
  float* flags;  // [4][BN]: 0 where a token is attended, else -inf; to be added to its scores
  const T* key;
  const T* value;
  const unsigned char* mask;
  int64_t key_s, value_s, mask_s;
  int first, end, size;
  bool vector;
  float ahead;  // this thread's flag of the tile after the next: loaded early, it arrives during the products

  DEVICE void set(const AttentionParameters& p, int64_t b, int g, T* memory, void* flag_memory) {
    tiles = memory;
    flags = static_cast<float*>(flag_memory);
    key = static_cast<const T*>(p.key) + b * p.key_b + g * p.key_g;
    value = static_cast<const T*>(p.value) + b * p.value_b + g * p.value_g;
    mask = p.mask ? p.mask + b * p.mask_b : nullptr;
    key_s = p.key_s;
    value_s = p.value_s;
    mask_s = p.mask_s;
    size = p.size;
    vector = p.vector_source;
  }
  DEVICE int count() const { return (end - first + BN - 1) / BN; }
  DEVICE const T* key_tile(int j) const { return tiles + j % STAGES * (2 * BN * D); }
  DEVICE const T* value_tile(int j) const { return key_tile(j) + BN * D; }
  DEVICE const float* tile_flags(int j) const { return flags + j % 4 * BN; }

  // For all threads: begin(), also before another pass; then arrive(j) and leave(j) for each tile. Tile j is readable
  // between arrive(j) and arrive(j + 1); leave(j) starts loading tile j + 1 where there is a second stage.
  // Four generations of flags, so that a warp that is ahead does not overwrite those that another one reads; the tiles
  // are protected by the barrier in arrive().
  DEVICE void begin() {
    ahead = flag(0);
    sync_threads();
    store_flag(0);
    sync_threads();
    if (STAGES == 2) issue(0);
    ahead = flag(1);
  }
  DEVICE void arrive(int j) {
    if (STAGES == 1) {
      sync_threads();
      issue(j);
    }
    cp_async_wait();
    store_flag(j + 1);
    sync_threads();
  }
  DEVICE void leave(int j) {
    if (STAGES == 2) issue(j + 1);
    ahead = flag(j + 2);
  }

 private:
  DEVICE float flag(int j) const {
    const int64_t s = first + static_cast<int64_t>(j) * BN + thread_index();
    return thread_index() < BN && s < end && (!mask || mask[s * mask_s]) ? 0.0f : -infinity();
  }
  DEVICE void store_flag(int j) const {
    if (thread_index() < BN) flags[j % 4 * BN + thread_index()] = ahead;
  }
  DEVICE void issue(int j) {
    if (j >= count()) return;
    const float* attended = tile_flags(j);
    T* to = tiles + j % STAGES * (2 * BN * D);
    const int64_t s = first + static_cast<int64_t>(j) * BN;
    load_tile<T, D, BN, THREADS>(to, size, vector, key + s * key_s, key_s, attended);
    load_tile<T, D, BN, THREADS>(to + BN * D, size, vector, value + s * value_s, value_s, attended);
  }
};

// Shapes of the kernels' blocks, by type and bucket of head sizes (D).
template <typename T, int D>
struct BlockShape {
  static constexpr bool kHalf = sizeof(T) == 2;
  // Forward and dquery: warps of 16 rows, source tokens a tile, tiles in flight.
  static constexpr int kWarps = kHalf || D == 64 ? 4 : 2;
  static constexpr int kSource = kHalf ? (D == 256 ? 32 : 64) : (D == 256 ? 16 : 32);
  static constexpr int kStages = kHalf || D == 64 ? 2 : 1;
  static constexpr bool kKeepQuery = kHalf && D <= 128;  // in registers, else read again for every tile
  // The same for dquery, which has the gradient's rows, too.
  static constexpr int kBackSource = kHalf && D == 64 ? 64 : kHalf || D < 256 ? 32 : 16;
  static constexpr int kBackStages = (kHalf && D <= 128) || D == 64 ? 2 : 1;
  static constexpr bool kBackKeep = kHalf && D == 64;
  // dkey and dvalue: rows a tile, tiles in flight.
  static constexpr int kQueries = kHalf ? (D == 64 ? 64 : D == 128 ? 32 : 16) : (D == 256 ? 16 : 32);
  static constexpr int kQueryStages = kHalf || D == 64 ? 2 : 1;
};

// Launches of one element type, each in a file of its own.
template <typename T>
void attention_rows(const AttentionParameters& p, int64_t batch, bool few_rows, const char* name, Launch launch);
template <typename T>
void attention_dquery(const AttentionParameters& p, int64_t batch, Launch launch);
template <typename T>
void attention_dsource(const AttentionParameters& p, int64_t batch, Launch launch);

}  // namespace layalign::cuda
