// out = residual + gate * softmax(query key^T * scale) value for few rows: in decoding a group has H / G * T of them.
//
// K and V are read where they lie, in their own type, in blocks of kKeyBlock tokens, with lanes over the head size.
// kLanes scores at a time, (R rows) x (kLanes / R tokens), are summed over the lanes together by sum_each.
// Bound by memory: 2 n d elements of K and V per group for 4 n d flop per row.
// Scratch: kFewRows rows of d and of kKeyBlock floats, on the stack: at most 24 KiB.
#include "gated_cross_attention.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kKeyBlock = 128;
constexpr int64_t kDeepest = 4;  // rows that share a load of K or V

// Lane r * K + k: the product of row r with token k, K = kLanes / R.
template <int R, typename T>
inline Vec products(const float* query, int64_t row, const T* const* keys, int64_t size) {
  constexpr int K = kLanes / R;
  Vec total[kLanes];
  LAYALIGN_UNROLL
  for (int i = 0; i < kLanes; ++i) total[i] = Vec{};
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes) {
    LAYALIGN_UNROLL
    for (int k = 0; k < K; ++k) {
      const Vec key = load(keys[k] + c);
      LAYALIGN_UNROLL
      for (int r = 0; r < R; ++r) total[r * K + k] += load(query + r * row + c) * key;
    }
  }
  if (c < size) {
    LAYALIGN_UNROLL
    for (int k = 0; k < K; ++k) {
      const Vec key = load_first(keys[k] + c, size - c);
      LAYALIGN_UNROLL
      for (int r = 0; r < R; ++r) total[r * K + k] += load(query + r * row + c) * key;
    }
  }
  return sum_each(total);
}

// scores[r, s] for R rows and `count` tokens; scores' rows are kKeyBlock long and written up to a whole register.
template <int R, typename T>
void score(const float* query, int64_t row, const T* const* keys, int64_t count, int64_t size, float* scores) {
  constexpr int K = kLanes / R;
  for (int64_t s = 0; s < count; s += K) {
    const T* some[K];
    for (int64_t k = 0; k < K; ++k) some[k] = keys[smaller(s + k, count - 1)];
    const Vec found = products<R>(query, row, some, size);
    float lanes[kLanes];
    store(lanes, found);
    for (int r = 0; r < R; ++r) memcpy(scores + r * kKeyBlock + s, lanes + r * K, sizeof(float) * K);
  }
}

// total[r, :] = factor[r] * total[r, :] + sum_s powers[r, s] * values[s], V registers of R rows from column c.
template <int R, int V, typename T>
inline void add_values(
    const float* powers, const float* factor, const T* const* values, int64_t count, int64_t c, float* total,
    int64_t width) {
  Vec sums[R][V];
  LAYALIGN_UNROLL
  for (int r = 0; r < R; ++r) {
    LAYALIGN_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vec{};
  }
  for (int64_t s = 0; s < count; ++s) {
    LAYALIGN_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vec value = load(values[s] + c + v * kLanes);
      LAYALIGN_UNROLL
      for (int r = 0; r < R; ++r) sums[r][v] += splat(powers[r * kKeyBlock + s]) * value;
    }
  }
  LAYALIGN_UNROLL
  for (int r = 0; r < R; ++r) {
    LAYALIGN_UNROLL
    for (int v = 0; v < V; ++v) {
      float* to = total + r * width + c + v * kLanes;
      store(to, load(to) * factor[r] + sums[r][v]);
    }
  }
}

template <int R, typename T>
void add_block(
    const float* powers, const float* factor, const T* const* values, int64_t count, int64_t size, float* total,
    int64_t width) {
  constexpr int V = kRegisters == 32 ? 4 : R == 4 ? 2 : 4;
  int64_t c = 0;
  for (; c + V * kLanes <= size; c += V * kLanes) add_values<R, V>(powers, factor, values, count, c, total, width);
  for (; c + kLanes <= size; c += kLanes) add_values<R, 1>(powers, factor, values, count, c, total, width);
  if (c == size) return;
  for (int r = 0; r < R; ++r) {
    Vec sums = load(total + r * width + c) * factor[r];
    for (int64_t s = 0; s < count; ++s) sums += splat(powers[r * kKeyBlock + s]) * load_first(values[s] + c, size - c);
    store(total + r * width + c, sums);
  }
}

// Prefetches rows that are read soon: they lie a row of all heads apart, too far for the hardware prefetcher.
template <typename T>
inline void fetch(const T* const* rows, int64_t count, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t c = 0; c < size; c += kLine) __builtin_prefetch(rows[s] + c, 0, 2);
  }
}

// The online softmax's state of R rows: their queries, and the sums so far.
struct Rows {
  alignas(64) float query[kDeepest * kMaxHeadSize];
  alignas(64) float total[kDeepest * kMaxHeadSize];
  alignas(64) float scores[kDeepest * kKeyBlock];
  float highest[kDeepest], sums[kDeepest], factor[kDeepest];
};

template <int R>
void softmax_rows(Rows& x, int64_t count) {
  for (int r = 0; r < R; ++r) {
    float* scores = x.scores + r * kKeyBlock;
    for (int64_t s = count; s < round_up(count, kLanes); ++s) scores[s] = -kInfinity;
    Vec most = splat(x.highest[r]);
    for (int64_t s = 0; s < count; s += kLanes) most = maximum(load(scores + s), most);
    const float before = x.highest[r], highest = largest(most);
    const float shift = highest == -kInfinity ? 0 : highest;
    Vec total{};
    for (int64_t s = 0; s < count; s += kLanes) {
      const Vec power = exp2(load(scores + s) - shift);
      store(scores + s, power);
      total += power;
    }
    x.factor[r] = exp2(splat(before - shift))[0];
    x.sums[r] = x.sums[r] * x.factor[r] + sum(total);
    x.highest[r] = highest;
  }
}

// R rows of group g from row `begin` on.
template <int R, typename T>
void attend_rows(
    const Attention& in, const Sizes& n, const Attended& attended, const Tensor& out, const Tensor& lse, float gate,
    int64_t b, int64_t g, int64_t begin) {
  Rows x;
  const float factor = in.scale * kLog2e;
  for (int r = 0; r < R; ++r) {
    float* query = x.query + r * n.width;
    widen(in.query.dtype, at(in.query, b, n.head(g, begin + r), n.token(begin + r)), n.size, query);
    for (int64_t c = 0; c < n.width; c += kLanes) {
      store(query + c, load(query + c) * factor);
      store(x.total + r * n.width + c, Vec{});
    }
    x.highest[r] = -kInfinity;
    x.sums[r] = 0;
  }
  const int64_t count = attended.count(b);
  const int32_t* tokens = attended.of(b);
  auto where = [&](const Tensor& states, int64_t s) { return reinterpret_cast<const T*>(at(states, b, g, tokens[s])); };
  const T *keys[kKeyBlock], *values[kKeyBlock];
  for (int64_t from = 0; from < count; from += kKeyBlock) {
    const int64_t some = smaller(kKeyBlock, count - from);
    for (int64_t s = 0; s < some; ++s) keys[s] = where(in.key, from + s), values[s] = where(in.value, from + s);
    if (begin == 0) fetch(keys, some, n.size), fetch(values, some, n.size);
    score<R>(x.query, n.width, keys, some, n.size, x.scores);
    softmax_rows<R>(x, some);
    add_block<R>(x.scores, x.factor, values, some, n.size, x.total, n.width);
  }
  for (int r = 0; r < R; ++r) {
    const int64_t h = n.head(g, begin + r), t = n.token(begin + r);
    finish_row(in, n, out, b, t, h, x.total + r * n.width, count == 0 ? gate * 0 : gate / x.sums[r]);
    if (!lse) continue;
    *reinterpret_cast<float*>(at(lse, b, h, t)) = count == 0 ? -kInfinity : x.highest[r] + __builtin_log2f(x.sums[r]);
  }
}

template <typename T>
void attend_group(
    const Attention& in, const Sizes& n, const Attended& attended, const Tensor& out, const Tensor& lse, float gate,
    int64_t b, int64_t g) {
  int64_t i = 0;
  for (; i + 4 <= n.rows; i += 4) attend_rows<4, T>(in, n, attended, out, lse, gate, b, g, i);
  if (i + 2 <= n.rows) attend_rows<2, T>(in, n, attended, out, lse, gate, b, g, i), i += 2;
  if (i < n.rows) attend_rows<1, T>(in, n, attended, out, lse, gate, b, g, i);
}

}  // namespace

void attend_few_rows(const Attention& in, const Tensor& out, const Tensor& lse, int threads) {
  const Sizes n(in);
  const int64_t pairs = n.batch * n.groups;
  if (pairs * n.rows == 0 || n.size == 0) return;
  const double bytes = 2.0 * static_cast<double>(pairs * n.source * n.size * element_size(in.key.dtype));
  threads = worth_threads(threads, bytes / 1.5e4 * static_cast<double>(ceil_div(n.rows, kDeepest)));
  const Attended attended(in.key_mask, n.batch, n.source);
  const float gate = number(in.gate);
  parallel(pairs, threads, [&](int64_t pair, int) {
    const int64_t b = pair / n.groups, g = pair % n.groups;
    if (in.key.dtype == DType::float32) attend_group<float>(in, n, attended, out, lse, gate, b, g);
    else if (in.key.dtype == DType::bfloat16) attend_group<BFloat>(in, n, attended, out, lse, gate, b, g);
    else attend_group<Half>(in, n, attended, out, lse, gate, b, g);
  });
}

void gated_cross_attention_decode(const AttentionDecode& call, int threads) {
  const Sizes n(call.in);
  if (n.rows <= kFewRows) attend_few_rows(call.in, call.out, Tensor{}, threads);
  else attend(call.in, call.out, Tensor{}, threads);
}

}  // namespace layalign::cpu::LAYALIGN_ISA
