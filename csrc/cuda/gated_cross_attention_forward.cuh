// Gated cross-attention, forward and decode: out = residual + gate * softmax(q k^T * scale + mask) v, lse in base 2.
//
// Counted for B sequences, H heads over G groups of size d, T rows, S source tokens, c bytes an element:
// 4 B H T S d FLOP; reads c B d (2 H T + 2 G S) bytes (query and residual, key and value, the latter from L2 after the
// first block of rows of a group), writes c B H T d. A block has 16 ROW_WARPS packed rows of a group; with
// SOURCE_WARPS > 1 (decode) warps have the same rows and share the tokens of each tile, and their results are merged at
// the end.
// Scores and probabilities stay in registers; the softmax is online, in fp32.
#pragma once

#include "gated_cross_attention.cuh"

namespace layalign::cuda {

template <typename T, int D, int ROW_WARPS, int SOURCE_WARPS>
struct RowsLayout {
  using Shape = BlockShape<T, D>;
  static constexpr int kWarps = ROW_WARPS * SOURCE_WARPS, kThreads = 32 * kWarps, kRows = 16 * ROW_WARPS;
  static constexpr int kTile = Shape::kSource, kShare = kTile / SOURCE_WARPS, kStages = Shape::kStages;
  static constexpr int kStaged = kWarps * 16 * D * 4;  // bytes; takes the place of the tiles at the end
  // Queries that stay in registers are loaded into the second stage of the source, others have their own memory.
  static constexpr bool kOverlay = Shape::kKeepQuery && kStages == 2;
  static_assert(!kOverlay || kRows <= 2 * kTile);
  static constexpr int kTiles = ((kOverlay ? 0 : kRows) + 2 * kStages * kTile) * D * static_cast<int>(sizeof(T));
  static constexpr int kMain = kTiles > kStaged ? kTiles : kStaged;
  static constexpr int kScratch = kMain, kStats = kScratch + 4 * (sizeof(T) == 4 ? kWarps * 16 * (kShare + 4) : 0);
  static constexpr int kFlags = kStats + kWarps * 16 * 2 * 4, kBytes = kFlags + 16 * kTile;
};

// One tile of the online softmax: scores become probabilities relative to the running maximum, results are rescaled.
template <int N, int D>
DEVICE void online_softmax(float (&score)[N / 8][4], float (&acc)[D / 8][4], float (&highest)[2], float (&sum)[2],
                           const float* flags, float scale2) {
  const int column = lane_index() % 4 * 2;
  float found[2] = {-infinity(), -infinity()};
  LAYALIGN_UNROLL
  for (int n = 0; n < N / 8; ++n) {
    const Float2 flag = load_float2(flags + 8 * n + column);
    LAYALIGN_UNROLL
    for (int i = 0; i < 4; ++i) {
      score[n][i] = fused(score[n][i], scale2, flag.at[i % 2]);
      found[i / 2] = maximum(found[i / 2], score[n][i]);
    }
  }
  LAYALIGN_UNROLL
  for (int r = 0; r < 2; ++r) {
    found[r] = maximum(found[r], shuffle_xor(found[r], 1));
    found[r] = maximum(found[r], shuffle_xor(found[r], 2));
    found[r] = maximum(found[r], highest[r]);
    const float reference = found[r] == -infinity() ? 0.0f : found[r];  // nothing attended so far
    const float before = exp2_fast(highest[r] - reference);
    highest[r] = found[r];
    float total = 0.0f;
    LAYALIGN_UNROLL
    for (int n = 0; n < N / 8; ++n) {
      LAYALIGN_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        score[n][i] = exp2_fast(score[n][i] - reference);
        total += score[n][i];
      }
    }
    sum[r] = sum[r] * before + total;  // this lane's columns only; the quad is summed at the end
    LAYALIGN_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      acc[n][2 * r] *= before;
      acc[n][2 * r + 1] *= before;
    }
  }
}

// Merges the staged results of the warps that share rows, and stores the rows: gated and with residual, or as a part.
template <typename T, int D, int ROW_WARPS, int SOURCE_WARPS>
DEVICE void finish_rows(const AttentionParameters& p, int64_t b, int g, int first, int split, const float* staged,
                        const float* stats) {
  constexpr int kRows = 16 * ROW_WARPS, kThreads = 32 * ROW_WARPS * SOURCE_WARPS;
  const float gate = load_any(p.gate, 0, p.gate_dtype);
  LAYALIGN_NO_UNROLL
  for (int i = thread_index(); i < kRows * D / 4; i += kThreads) {
    const int r = i / (D / 4), column = i % (D / 4) * 4;
    if (first + r >= p.rows || column >= p.size) continue;
    float highest = -infinity(), sum = 0.0f, weight[SOURCE_WARPS];
    LAYALIGN_UNROLL
    for (int w = 0; w < SOURCE_WARPS; ++w) highest = maximum(highest, stats[2 * (w * kRows + r)]);
    const float reference = highest == -infinity() ? 0.0f : highest;
    LAYALIGN_UNROLL
    for (int w = 0; w < SOURCE_WARPS; ++w) {
      weight[w] = SOURCE_WARPS == 1 ? 1.0f : exp2_fast(stats[2 * (w * kRows + r)] - reference);
      sum += weight[w] * stats[2 * (w * kRows + r) + 1];
    }
    Float4 x{{0.0f, 0.0f, 0.0f, 0.0f}};
    LAYALIGN_UNROLL
    for (int w = 0; w < SOURCE_WARPS; ++w) {
      const Float4 y = load_float4(staged + w * (kRows * D) + at_swizzled<float, D>(r, column));
      LAYALIGN_UNROLL
      for (int k = 0; k < 4; ++k) x.at[k] += weight[w] * y.at[k];
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // a NaN stays one
    const PackedRow at = packed_row(p, g, first + r);
    const int64_t row = (b * p.length + at.t) * p.heads + at.head;
    const float lse = sum == 0.0f ? -infinity() : reference + log2_of(sum);
    if (p.part) {
      const int64_t parts_row = split * p.part_rows + row;
      LAYALIGN_UNROLL
      for (int k = 0; k < 4; ++k) x.at[k] *= inverse;
      store4(p.part + parts_row * p.size, column, p.size, p.vector_part, x);
      if (column == 0) p.part_lse[parts_row] = lse;
      continue;
    }
    const int64_t residual_at = b * p.residual_b + at.t * p.residual_t + at.head * p.residual_h;
    LAYALIGN_UNROLL
    for (int k = 0; k < 4; ++k) {
      x.at[k] *= inverse * gate;
      if (p.residual && column + k < p.size)
        x.at[k] += load_any(p.residual, residual_at + column + k, p.residual_dtype);
    }
    store4(static_cast<T*>(p.out) + row * p.size, column, p.size, p.vector_out, x);
    if (p.lse && column == 0) p.lse[first_packed(p, b, g) + first + r] = lse;
  }
}

// The 1 leaves room for all registers; without it ptxas spills a few to fit more blocks.
template <typename T, int D, int ROW_WARPS, int SOURCE_WARPS>
__global__ void __launch_bounds__(32 * ROW_WARPS * SOURCE_WARPS, 1)
    rows_kernel(KERNEL_PARAMETER AttentionParameters p) {
  using Layout = RowsLayout<T, D, ROW_WARPS, SOURCE_WARPS>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads, kShare = Layout::kShare;
  const BlockPlace at = block_place(p);
  const int64_t b = at.b;
  const int g = at.g, first = at.tile * kRows, split = at.split;
  T* tiles = reinterpret_cast<T*>(shared_memory()) + (Layout::kOverlay ? 0 : kRows * D);
  T* queries = reinterpret_cast<T*>(shared_memory()) + (Layout::kOverlay ? 2 * Layout::kTile * D : 0);
  float* stats = reinterpret_cast<float*>(shared_memory() + Layout::kStats);  // [SOURCE_WARPS][kRows][highest, sum]
  const int warp = warp_index(), row_warp = warp % ROW_WARPS, share = warp / ROW_WARPS * kShare;
  float* scratch = reinterpret_cast<float*>(shared_memory() + Layout::kScratch) + warp * 16 * (kShare + 4);

  SourceStream<T, D, Layout::kTile, Layout::kStages, kThreads> source;
  source.set(p, b, g, tiles, shared_memory() + Layout::kFlags);
  const int64_t begin = static_cast<int64_t>(split) * p.span;
  source.first = begin < p.source ? static_cast<int>(begin) : p.source;
  source.end = begin + p.span < p.source ? static_cast<int>(begin + p.span) : p.source;
  const Range range = attended_range<kThreads>(source.mask, source.mask_s, source.first, source.end,
                                               reinterpret_cast<int*>(stats));
  source.first = range.first;
  source.end = range.end;
  load_tile<T, D, kRows, kThreads>(queries, p.size, p.vector_query,
                                   [&](int r) { return query_row<T>(p, b, g, first + r); });
  source.begin();
  LeftRows<T, D, Layout::Shape::kKeepQuery> left;
  left.set(queries, 16 * row_warp);
  float acc[D / 8][4] = {}, highest[2] = {-infinity(), -infinity()}, sum[2] = {};
  LAYALIGN_NO_UNROLL
  for (int j = 0; j < source.count(); ++j) {
    source.arrive(j);
    if (j == 0) {
      left.keep();
      if (Layout::kOverlay) sync_threads();
    }
    source.leave(j);
    float score[kShare / 8][4] = {};
    multiply_transposed<T, D, kShare>(score, left, source.key_tile(j), share);
    online_softmax<kShare, D>(score, acc, highest, sum, source.tile_flags(j) + share, p.scale2);
    multiply<T, D, kShare>(acc, score, source.value_tile(j), share, scratch);
  }
  cp_async_wait();
  sync_threads();
  float* staged = reinterpret_cast<float*>(shared_memory());
  stage<D>(staged + warp * (16 * D), acc);
  LAYALIGN_UNROLL
  for (int r = 0; r < 2; ++r) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    if (lane_index() % 4 == 0) {
      float* to = stats + 2 * (warp * 16 + lane_index() / 4 + 8 * r);
      to[0] = highest[r];
      to[1] = sum[r];
    }
  }
  sync_threads();
  finish_rows<T, D, ROW_WARPS, SOURCE_WARPS>(p, b, g, first, split, staged, stats);
}

template <typename T, int D, int ROW_WARPS, int SOURCE_WARPS>
void launch_rows(const AttentionParameters& p, int64_t batch, const char* name, Launch launch) {
  using Layout = RowsLayout<T, D, ROW_WARPS, SOURCE_WARPS>;
  static_assert(Layout::kBytes <= 99 * 1024);
  const int64_t blocks = batch * p.groups * p.tiles * p.splits;
  queue(name, rows_kernel<T, D, ROW_WARPS, SOURCE_WARPS>, blocks, Layout::kThreads, Layout::kBytes, launch, p);
}

template <typename T, int D>
void launch_rows_of(const AttentionParameters& p, int64_t batch, bool few_rows, const char* name, Launch launch) {
  constexpr int kWarps = BlockShape<T, D>::kWarps;
  constexpr bool kHalf = sizeof(T) == 2;
  if (few_rows) {
    launch_rows<T, D, 1, kHalf && D <= 128 ? 4 : 2>(p, batch, name, launch);
  } else {
    launch_rows<T, D, kWarps, 1>(p, batch, name, launch);
  }
}

template <typename T>
void attention_rows(const AttentionParameters& p, int64_t batch, bool few_rows, const char* name, Launch launch) {
  if (p.size <= 64) {
    launch_rows_of<T, 64>(p, batch, few_rows, name, launch);
  } else if (p.size <= 128) {
    launch_rows_of<T, 128>(p, batch, few_rows, name, launch);
  } else {
    launch_rows_of<T, 256>(p, batch, few_rows, name, launch);
  }
}

}  // namespace layalign::cuda
