// Gated cross-attention, backward. With p = softmax, g the incoming gradient, a the gate:
//
//   delta_t = sum_s p_ts (g_t . v_s)     dgate = sum_t delta_t     dv_s = a sum_t p_ts g_t
//   e_ts = p_ts (g_t . v_s - delta_t)    dq_t = a scale sum_s e_ts k_s     dk_s = a scale sum_t e_ts q_t
//
// p is recomputed from the log-sum-exp. In fp32 it carries that number's rounding error, several units, so p is divided
// by its own sum. delta comes from p, not from the forward's result: the gate may be zero. The gate is applied last, so
// that a small one causes no underflow. No atomics: a block owns its rows of dq, or its tokens of dk and dv, for which
// it walks through the queries of all heads of the group in order.
//
// dquery: 10 B H T S d FLOP (two of its five products in a first pass for delta, which a source of one tile does not
// need); reads c B d (2 H T + 2 G S). dkey and dvalue: 8 B H T S d FLOP (10 for d > 128); reads
// c B d (2 G S + ceil(S / 64) 2 H T).
#pragma once

#include "gated_cross_attention.cuh"

namespace layalign::cuda {

// -- dquery, delta and the gate's gradient ----------------------------------------------------------------------------

template <typename T, int D>
struct QueryLayout {
  using Shape = BlockShape<T, D>;
  static constexpr int kWarps = Shape::kWarps, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kTile = Shape::kBackSource, kStages = Shape::kBackStages;
  static constexpr int kScratch = (2 * kRows + 2 * kStages * kTile) * D * static_cast<int>(sizeof(T));
  static constexpr int kStats = kScratch + 4 * (sizeof(T) == 4 ? kWarps * 16 * (kTile + 4) : 0);
  static constexpr int kFlags = kStats + 8 * kWarps, kBytes = kFlags + 16 * kTile;
};

// p and g . v of a tile: this lane's elements of the 16 x N scores of its warp.
template <typename T, int D, int N, bool KEEP>
DEVICE void recompute(float (&p)[N / 8][4], float (&gv)[N / 8][4], const LeftRows<T, D, KEEP>& query,
                      const LeftRows<T, D, KEEP>& grad, const T* key, const T* value, const float* flags,
                      const float (&lse)[2], float scale2) {
  const int column = lane_index() % 4 * 2;
  LAYALIGN_UNROLL
  for (int n = 0; n < N / 8; ++n) {
    LAYALIGN_UNROLL
    for (int i = 0; i < 4; ++i) p[n][i] = gv[n][i] = 0.0f;
  }
  multiply_transposed<T, D, N>(p, query, key, 0);
  multiply_transposed<T, D, N>(gv, grad, value, 0);
  LAYALIGN_UNROLL
  for (int n = 0; n < N / 8; ++n) {
    const Float2 flag = load_float2(flags + 8 * n + column);
    LAYALIGN_UNROLL
    for (int i = 0; i < 4; ++i) p[n][i] = exp2_fast(fused(p[n][i], scale2, flag.at[i % 2]) - lse[i / 2]);
  }
}

// The block's delta: to memory, and its sum, over rows in a fixed order, as the block's share of dgate.
template <int ROWS>
DEVICE void store_delta(const AttentionParameters& p, int64_t packed, int first, const float (&delta)[2],
                        const float (&inverse)[2], float* stats) {
  const int lane = lane_index(), row = first + 16 * warp_index() + lane / 4;
  LAYALIGN_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (lane % 4 != 0 || row + 8 * r >= p.rows) continue;
    if (p.delta) p.delta[packed + row + 8 * r] = delta[r];
    if (p.inverse) p.inverse[packed + row + 8 * r] = inverse[r];
  }
  if (!p.dgate_part) return;
  float sum = (row < p.rows ? delta[0] : 0.0f) + (row + 8 < p.rows ? delta[1] : 0.0f);
  LAYALIGN_UNROLL
  for (int i = 4; i < 32; i *= 2) sum += shuffle_xor(sum, i);
  if (lane == 0) stats[warp_index()] = sum;
  sync_threads();
  if (thread_index() == 0) {
    float total = 0.0f;
    for (int w = 0; w < ROWS / 16; ++w) total += stats[w];
    p.dgate_part[block_index()] = total;
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(QueryLayout<T, D>::kThreads, 1)
    dquery_kernel(KERNEL_PARAMETER AttentionParameters p) {
  using Layout = QueryLayout<T, D>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads, kTile = Layout::kTile;
  constexpr bool kKeep = Layout::Shape::kBackKeep;
  const BlockPlace at = block_place(p);
  const int64_t b = at.b, packed = first_packed(p, b, at.g);
  const int g = at.g, first = at.tile * kRows;
  T* queries = reinterpret_cast<T*>(shared_memory());
  T* grads = queries + kRows * D;
  float* scratch = reinterpret_cast<float*>(shared_memory() + Layout::kScratch) + warp_index() * 16 * (kTile + 4);
  float* stats = reinterpret_cast<float*>(shared_memory() + Layout::kStats);

  SourceStream<T, D, kTile, Layout::kStages, kThreads> source;
  source.set(p, b, g, grads + kRows * D, shared_memory() + Layout::kFlags);
  const Range range =
      attended_range<kThreads>(source.mask, source.mask_s, 0, p.source, reinterpret_cast<int*>(stats));
  source.first = range.first;
  source.end = range.end;
  load_tile<T, D, kRows, kThreads>(queries, p.size, p.vector_query,
                                   [&](int r) { return query_row<T>(p, b, g, first + r); });
  load_tile<T, D, kRows, kThreads>(grads, p.size, p.vector_grad,
                                   [&](int r) { return grad_row<T>(p, b, g, first + r); });
  LeftRows<T, D, kKeep> query, grad;
  query.set(queries, 16 * warp_index());
  grad.set(grads, 16 * warp_index());
  constexpr bool kNormalize = sizeof(T) == 4;
  float lse[2], delta[2] = {}, total[2] = {}, inverse[2] = {1.0f, 1.0f};
  LAYALIGN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = first + 16 * warp_index() + lane_index() / 4 + 8 * r;
    lse[r] = row < p.rows ? p.lse[packed + row] : 0.0f;
  }

  float prob[kTile / 8][4] = {}, gv[kTile / 8][4] = {};
  const int count = source.count();
  source.begin();
  LAYALIGN_NO_UNROLL
  for (int j = 0; j < count; ++j) {
    source.arrive(j);
    source.leave(j);
    if (j == 0) {
      query.keep();
      grad.keep();
    }
    recompute<T, D, kTile>(prob, gv, query, grad, source.key_tile(j), source.value_tile(j), source.tile_flags(j), lse,
                           p.scale2);
    LAYALIGN_UNROLL
    for (int n = 0; n < kTile / 8; ++n) {
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        delta[i / 2] += prob[n][i] * gv[n][i];
        if (kNormalize) total[i / 2] += prob[n][i];
      }
    }
  }
  LAYALIGN_UNROLL
  for (int r = 0; r < 2; ++r) {
    delta[r] += shuffle_xor(delta[r], 1);
    delta[r] += shuffle_xor(delta[r], 2);
    if (!kNormalize) continue;
    total[r] += shuffle_xor(total[r], 1);
    total[r] += shuffle_xor(total[r], 2);
    inverse[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
    delta[r] *= inverse[r];
  }
  store_delta<kRows>(p, packed, first, delta, inverse, stats);
  if (!p.dquery) {
    cp_async_wait();
    return;
  }

  float acc[D / 8][4] = {};
  if (count > 1) source.begin();
  LAYALIGN_NO_UNROLL
  for (int j = 0; j < count; ++j) {
    if (count > 1) {  // else everything is still in registers
      source.arrive(j);
      source.leave(j);
      recompute<T, D, kTile>(prob, gv, query, grad, source.key_tile(j), source.value_tile(j), source.tile_flags(j),
                             lse, p.scale2);
    }
    LAYALIGN_UNROLL
    for (int n = 0; n < kTile / 8; ++n) {
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        prob[n][i] *= gv[n][i] - delta[i / 2];
        if (kNormalize) prob[n][i] *= inverse[i / 2];
      }
    }
    multiply<T, D, kTile>(acc, prob, source.key_tile(j), 0, scratch);
  }
  cp_async_wait();
  sync_threads();
  float* staged = reinterpret_cast<float*>(shared_memory());
  stage<D>(staged + warp_index() * (16 * D), acc);
  sync_threads();
  const float factor = load_any(p.gate, 0, p.gate_dtype) * p.scale;
  store_staged<T, D, kRows, kThreads>(staged, factor, p.size, p.vector_dquery, [&](int r) -> T* {
    if (first + r >= p.rows) return nullptr;
    const PackedRow row = packed_row(p, g, first + r);
    return static_cast<T*>(p.dquery) + b * p.dquery_b + row.head * p.dquery_h + row.t * p.dquery_t;
  });
}

// -- dkey and dvalue --------------------------------------------------------------------------------------------------

template <typename T, int D>
struct TokenLayout {
  using Shape = BlockShape<T, D>;
  static constexpr int kWarps = Shape::kWarps, kThreads = 32 * kWarps, kTokens = 16 * kWarps;
  static constexpr int kTile = Shape::kQueries, kStages = Shape::kQueryStages;
  static constexpr int kScratch = (2 * kTokens + 2 * kStages * kTile) * D * static_cast<int>(sizeof(T));
  static constexpr int kStats = kScratch + 4 * (sizeof(T) == 4 ? kWarps * 16 * (kTile + 4) : 0);
  static constexpr bool kNormalize = sizeof(T) == 4;
  static constexpr int kNumbers = kNormalize ? 3 : 2;  // a row's: log-sum-exp, delta, 1 / sum of p
  static constexpr int kBytes = kStats + kStages * kNumbers * kTile * 4;
};

// Tiles of packed rows of query and gradient with their numbers: [STAGES][2][ROWS][D], [STAGES][kNumbers][ROWS].
template <typename T, int D>
struct QueryStream {
  using Layout = TokenLayout<T, D>;
  static constexpr int kRows = Layout::kTile, kStages = Layout::kStages, kThreads = Layout::kThreads;
  T* tiles;
  float* stats;
  int64_t b, packed;
  int g;

  DEVICE const T* query_tile(int j) const { return tiles + j % kStages * (2 * kRows * D); }
  DEVICE const T* grad_tile(int j) const { return query_tile(j) + kRows * D; }
  DEVICE const float* lse(int j) const { return stats + j % kStages * (Layout::kNumbers * kRows); }
  DEVICE const float* delta(int j) const { return lse(j) + kRows; }
  DEVICE const float* inverse(int j) const { return lse(j) + 2 * kRows; }

  DEVICE void begin(const AttentionParameters& p, int j, int end) const {
    if (kStages == 2 && j < end) issue(p, j);
  }
  // All threads: makes tile j readable and starts loading the next.
  DEVICE void next(const AttentionParameters& p, int j, int end) const {
    if (kStages == 2) {
      cp_async_wait();
      sync_threads();
      if (j + 1 < end) issue(p, j + 1);
    } else {
      sync_threads();
      issue(p, j);
      cp_async_wait();
      sync_threads();
    }
  }

 private:
  DEVICE void issue(const AttentionParameters& p, int j) const {
    const int first = j * kRows;
    T* to = tiles + j % kStages * (2 * kRows * D);
    load_tile<T, D, kRows, kThreads>(to, p.size, p.vector_query,
                                     [&](int r) { return query_row<T>(p, b, g, first + r); });
    load_tile<T, D, kRows, kThreads>(to + kRows * D, p.size, p.vector_grad,
                                     [&](int r) { return grad_row<T>(p, b, g, first + r); });
    const int i = thread_index();
    if (i >= kRows) return;
    float* numbers = stats + j % kStages * (Layout::kNumbers * kRows) + i;
    if (first + i < p.rows) {
      cp_async4(numbers, p.lse + packed + first + i);
      if (p.delta) cp_async4(numbers + kRows, p.delta + packed + first + i);
      if (Layout::kNormalize) cp_async4(numbers + 2 * kRows, p.inverse + packed + first + i);
    } else {  // rows that do not exist: all zero, they add nothing
      LAYALIGN_UNROLL
      for (int k = 0; k < Layout::kNumbers; ++k) numbers[k * kRows] = 0.0f;
    }
  }
};

// NEED_KEY, NEED_VALUE: which accumulators there are; a null pointer still leaves one out at run time.
template <typename T, int D, bool NEED_KEY, bool NEED_VALUE>
__global__ void __launch_bounds__(TokenLayout<T, D>::kThreads, 1)
    dsource_kernel(KERNEL_PARAMETER AttentionParameters p) {
  using Layout = TokenLayout<T, D>;
  constexpr int kTokens = Layout::kTokens, kThreads = Layout::kThreads, kTile = Layout::kTile;
  const BlockPlace place = block_place(p);
  const int64_t b = place.b;
  const int g = place.g, first = place.tile * kTokens, split = place.split;
  const bool need_key = NEED_KEY && p.dkey, need_value = NEED_VALUE && p.dvalue;
  T* keys = reinterpret_cast<T*>(shared_memory());
  T* values = keys + kTokens * D;
  float* scratch = reinterpret_cast<float*>(shared_memory() + Layout::kScratch) + warp_index() * 16 * (kTile + 4);
  const auto attended = [&](int r) {
    return first + r < p.source && (!p.mask || p.mask[b * p.mask_b + (first + r) * p.mask_s]);
  };
  const auto token = [&](const void* data, int64_t stride_b, int64_t stride_g, int64_t stride_s, int r) {
    const T* at = static_cast<const T*>(data) + b * stride_b + g * stride_g + (first + r) * stride_s;
    return attended(r) ? at : nullptr;
  };
  const int row = 16 * warp_index() + lane_index() / 4;
  const bool keep[2] = {attended(row), attended(row + 8)};
  load_tile<T, D, kTokens, kThreads>(keys, p.size, p.vector_source,
                                     [&](int r) { return token(p.key, p.key_b, p.key_g, p.key_s, r); });
  if (need_key) {
    load_tile<T, D, kTokens, kThreads>(values, p.size, p.vector_source,
                                       [&](int r) { return token(p.value, p.value_b, p.value_g, p.value_s, r); });
  }
  LeftRows<T, D, false> key, value;
  key.set(keys, 16 * warp_index());
  value.set(values, 16 * warp_index());

  QueryStream<T, D> stream;
  stream.tiles = values + kTokens * D;
  stream.stats = reinterpret_cast<float*>(shared_memory() + Layout::kStats);
  stream.b = b;
  stream.g = g;
  stream.packed = first_packed(p, b, g);
  const int total = (p.rows + kTile - 1) / kTile;
  const int begin = split * p.span < total ? split * p.span : total;
  const int end = begin + p.span < total ? begin + p.span : total;
  float dkey[NEED_KEY ? D / 8 : 1][4] = {}, dvalue[NEED_VALUE ? D / 8 : 1][4] = {};
  stream.begin(p, begin, end);
  LAYALIGN_NO_UNROLL
  for (int j = begin; j < end; ++j) {
    stream.next(p, j, end);
    const int column = lane_index() % 4 * 2;
    float prob[kTile / 8][4] = {};
    multiply_transposed<T, D, kTile>(prob, key, stream.query_tile(j), 0);
    LAYALIGN_UNROLL
    for (int n = 0; n < kTile / 8; ++n) {
      const Float2 lse = load_float2(stream.lse(j) + 8 * n + column);
      LAYALIGN_UNROLL
      for (int i = 0; i < 4; ++i) {
        prob[n][i] = keep[i / 2] ? exp2_fast(fused(prob[n][i], p.scale2, -lse.at[i % 2])) : 0.0f;
      }
      if constexpr (Layout::kNormalize) {
        const Float2 inverse = load_float2(stream.inverse(j) + 8 * n + column);
        LAYALIGN_UNROLL
        for (int i = 0; i < 4; ++i) prob[n][i] *= inverse.at[i % 2];
      }
    }
    if constexpr (NEED_VALUE) {
      if (need_value) multiply<T, D, kTile>(dvalue, prob, stream.grad_tile(j), 0, scratch);
    }
    if constexpr (NEED_KEY) {
      if (need_key) {
        float gv[kTile / 8][4] = {};
        multiply_transposed<T, D, kTile>(gv, value, stream.grad_tile(j), 0);
        LAYALIGN_UNROLL
        for (int n = 0; n < kTile / 8; ++n) {
          const Float2 delta = load_float2(stream.delta(j) + 8 * n + column);
          LAYALIGN_UNROLL
          for (int i = 0; i < 4; ++i) prob[n][i] *= gv[n][i] - delta.at[i % 2];
        }
        multiply<T, D, kTile>(dkey, prob, stream.query_tile(j), 0, scratch);
      }
    }
  }
  cp_async_wait();
  const float gate = load_any(p.gate, 0, p.gate_dtype);
  float* staged = reinterpret_cast<float*>(shared_memory());
  const auto store = [&](const float(&acc)[D / 8][4], float factor, void* to, float* part, int64_t stride_b,
                         int64_t stride_g, int64_t stride_s, bool vector) {
    sync_threads();
    stage<D>(staged + warp_index() * (16 * D), acc);
    sync_threads();
    if (part) {
      const int64_t at = split * p.part_rows + (b * p.groups + g) * p.source + first;
      store_staged<float, D, kTokens, kThreads>(staged, factor, p.size, p.vector_part, [&](int r) -> float* {
        return first + r < p.source ? part + (at + r) * p.size : nullptr;
      });
    } else {
      T* at = static_cast<T*>(to) + b * stride_b + g * stride_g;
      store_staged<T, D, kTokens, kThreads>(staged, factor, p.size, vector, [&](int r) -> T* {
        return first + r < p.source ? at + (first + r) * stride_s : nullptr;
      });
    }
  };
  if constexpr (NEED_KEY) {
    if (need_key) {
      store(dkey, gate * p.scale, p.dkey, p.dkey_part, p.dkey_b, p.dkey_g, p.dkey_s, p.vector_dkey);
    }
  }
  if constexpr (NEED_VALUE) {
    if (need_value) {
      store(dvalue, gate, p.dvalue, p.dvalue_part, p.dvalue_b, p.dvalue_g, p.dvalue_s, p.vector_dvalue);
    }
  }
}

// -- launches ---------------------------------------------------------------------------------------------------------

constexpr const char* kBackward = "gated_cross_attention";

template <typename T, int D>
void launch_dquery(const AttentionParameters& p, int64_t batch, Launch launch) {
  using Layout = QueryLayout<T, D>;
  static_assert(Layout::kBytes <= 99 * 1024);
  queue(kBackward, dquery_kernel<T, D>, batch * p.groups * p.tiles, Layout::kThreads, Layout::kBytes, launch, p);
}

template <typename T>
void attention_dquery(const AttentionParameters& p, int64_t batch, Launch launch) {
  if (p.size <= 64) {
    launch_dquery<T, 64>(p, batch, launch);
  } else if (p.size <= 128) {
    launch_dquery<T, 128>(p, batch, launch);
  } else {
    launch_dquery<T, 256>(p, batch, launch);
  }
}

template <typename T, int D, bool NEED_KEY, bool NEED_VALUE>
void launch_dsource(const AttentionParameters& p, int64_t batch, Launch launch) {
  using Layout = TokenLayout<T, D>;
  static_assert(Layout::kBytes <= 99 * 1024);
  const int64_t blocks = batch * p.groups * p.tiles * p.splits;
  queue(kBackward, dsource_kernel<T, D, NEED_KEY, NEED_VALUE>, blocks, Layout::kThreads, Layout::kBytes, launch, p);
}

// For d > 128 the two accumulators do not fit into the registers together: a launch each.
template <typename T>
void attention_dsource(const AttentionParameters& p, int64_t batch, Launch launch) {
  if (p.size <= 64) {
    launch_dsource<T, 64, true, true>(p, batch, launch);
  } else if (p.size <= 128) {
    launch_dsource<T, 128, true, true>(p, batch, launch);
  } else {
    if (p.dkey) launch_dsource<T, 256, true, false>(p, batch, launch);
    if (p.dvalue) launch_dsource<T, 256, false, true>(p, batch, launch);
  }
}

}  // namespace layalign::cuda
