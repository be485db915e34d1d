// out = residual + gate * softmax(query key^T * scale) value for many rows.
//
// Shapes: a task takes some blocks of kRowBlock rows of one group, (rows, d), against the n <= S attended tokens, in
// blocks of kKeyBlock: scores^T (keys, rows) = K (keys, d) Q^T (d, rows), then out (rows, d) += P (rows, keys) V.
// With lanes over the rows, softmax's maxima and sums stay within a lane, and K needs no transposition.
// Arithmetic: 4 rows n d flop per task; bytes: K and V once per task, 8 n d, and from L2 for each block of rows.
// Scratch per thread: Q, Q^T and out (rows, d), a block of scores, and K and V of min(S, kKept) tokens, which are
// copied once for all rows of a task: 4 * (kRowBlock * (3 d + kKeyBlock) + 2 min(S, kKept) d) bytes for any T.
#include "gated_cross_attention.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kRowBlock = kMostRows;
constexpr int64_t kKeyBlock = 64;

// C = factor[i] * C + A B
struct Rescale {
  float* data;
  int64_t row;
  const float* factor;
  Vec first(int64_t, int64_t) const { return Vec{}; }
  void last(int64_t i, int64_t column, Vec value) const {
    float* to = data + i * row + column;
    store(to, load(to) * factor[i] + value);
  }
};

struct Buffers {
  int64_t columns;  // rows of a block, rounded up to registers
  float *query, *transposed, *total, *key, *value, *scores, *highest, *sums, *factor;

  static int64_t tokens(const Sizes& n) { return n.source <= kKept ? n.source : kKeyBlock; }
  static int64_t size(const Sizes& n, int64_t columns) {
    return columns * (3 * n.width + kKeyBlock + 3) + 2 * tokens(n) * n.width;
  }
  Buffers(const Sizes& n, int64_t columns_, float* memory) : columns(columns_) {
    query = memory;
    transposed = query + columns * n.width;
    total = transposed + columns * n.width;
    key = total + columns * n.width;
    value = key + tokens(n) * n.width;
    scores = value + tokens(n) * n.width;
    highest = scores + kKeyBlock * columns;
    sums = highest + columns;
    factor = sums + columns;
  }
};

// One step of the online softmax: scores (keys, columns) become 2^(score - highest); earlier blocks' sums are to be
// multiplied by `factor`.
void softmax_block(const Buffers& x, int64_t keys) {
  for (int64_t c = 0; c < x.columns; c += kLanes) {
    float* scores = x.scores + c;
    const Vec before = load(x.highest + c);
    Vec highest = before;
    for (int64_t s = 0; s < keys; ++s) highest = maximum(load(scores + s * x.columns), highest);
    // Where all scores are -inf so far, subtracting 0 instead leaves them so, and their powers 0.
    const Vec shift = highest == -kInfinity ? Vec{} : highest;
    const Vec factor = exp2(before - shift);
    Vec total{};
    for (int64_t s = 0; s < keys; ++s) {
      const Vec power = exp2(load(scores + s * x.columns) - shift);
      store(scores + s * x.columns, power);
      total += power;
    }
    store(x.highest + c, highest);
    store(x.factor + c, factor);
    store(x.sums + c, load(x.sums + c) * factor + total);
  }
}

// Some blocks of rows of one group.
struct Task {
  const Attention& in;
  const Sizes& n;
  const Tensor &out, &lse;
  const Buffers& x;
  int64_t b, g, count;
  const int32_t* tokens;
  float gate;
  bool kept;  // key and value hold all tokens
  Left key, value;

  Task(const Attention& in_, const Sizes& n_, const Attended& attended, const Tensor& out_, const Tensor& lse_,
       const Buffers& x_, int64_t pair, float gate_, bool reused)
      : in(in_), n(n_), out(out_), lse(lse_), x(x_), b(pair / n.groups), g(pair % n.groups), count(attended.count(b)),
        tokens(attended.of(b)), gate(gate_), kept(n.source <= kKept), key{}, value{} {
    if (kept && count > 0) take(0, count, reused);
  }

  void take(int64_t from, int64_t keys, bool reused) {
    key = token_rows(in.key, n, b, g, tokens + from, keys, false, reused, x.key);
    value = token_rows(in.value, n, b, g, tokens + from, keys, true, true, x.value);
  }

  void run(int64_t begin, int64_t rows);
};

void Task::run(int64_t begin, int64_t rows) {
  const Places to(n, g, begin, rows);
  auto query = [&](int64_t i) { return at(in.query, b, to.head[i], to.token[i]); };
  pack_rows(in.query.dtype, query, rows, n.size, n.width, x.query);
  pack_transposed(x.query, rows, n.width, in.scale * kLog2e, x.columns, x.transposed);
  for (int64_t c = 0; c < x.columns; ++c) x.highest[c] = -kInfinity, x.sums[c] = 0;

  const int64_t blocks = ceil_div(count, kKeyBlock);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = count * block / blocks, keys = count * (block + 1) / blocks - from;
    if (!kept) take(from, keys, true);
    const Left own_keys = rows_from(key, kept ? from : 0), own_values = rows_from(value, kept ? from : 0);
    multiply_deep(keys, x.columns / kLanes, n.size, own_keys, Right{x.transposed, x.columns}, x.scores);
    softmax_block(x, keys);
    const Left powers{x.scores, 1, x.columns};
    const Right values{own_values.data, own_values.row};
    if (block == 0) multiply(rows, n.vecs, keys, powers, values, Overwrite{x.total, n.width});
    else multiply(rows, n.vecs, keys, powers, values, Rescale{x.total, n.width, x.factor});
  }
  if (count == 0) memset(x.total, 0, sizeof(float) * static_cast<size_t>(rows * n.width));

  constexpr int64_t kAhead = 4;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t h = to.head[i], t = to.token[i];
    if (i + kAhead < rows) {
      const int64_t later_h = to.head[i + kAhead], later_t = to.token[i + kAhead];
      expect(at(out, b, later_t, later_h), n.size * element_size(out.dtype), true);
      if (in.residual) expect(at(in.residual, b, later_t, later_h), n.size * element_size(in.residual.dtype), false);
    }
    finish_row(in, n, out, b, t, h, x.total + i * n.width, count == 0 ? gate * 0 : gate / x.sums[i]);
    if (!lse) continue;
    *reinterpret_cast<float*>(at(lse, b, h, t)) = count == 0 ? -kInfinity : x.highest[i] + __builtin_log2f(x.sums[i]);
  }
}

}  // namespace

void attend(const Attention& in, const Tensor& out, const Tensor& lse, int threads) {
  const Sizes n(in);
  const int64_t blocks = ceil_div(n.rows, kRowBlock), pairs = n.batch * n.groups;
  if (pairs * blocks == 0 || n.size == 0) return;
  const double steps = 2.0 * static_cast<double>(n.batch * n.heads * n.length) * static_cast<double>(n.source * n.size);
  threads = worth_threads(threads, steps / 3e3 / kLanes);
  const Attended attended(in.key_mask, n.batch, n.source);
  const int64_t columns = round_up(ceil_div(n.rows, blocks), kLanes);
  const int64_t parts = smaller(blocks, larger(1, ceil_div(4 * threads, pairs)));  // each copies K and V once more
  const int64_t each = round_up(Buffers::size(n, columns), 16);
  const Scratch memory(each * smaller(threads, pairs * parts));
  const float gate = number(in.gate);
  parallel(pairs * parts, threads, [&](int64_t task, int worker) {
    const int64_t pair = task / parts, part = task % parts;
    const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
    const Buffers x(n, columns, memory.data + worker * each);
    Task work(in, n, attended, out, lse, x, pair, gate, last - first > 1);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = n.rows * block / blocks, end = n.rows * (block + 1) / blocks;
      work.run(begin, end - begin);
    }
  });
}

void gated_cross_attention_forward(const AttentionForward& call, int threads) {
  const Sizes n(call.in);
  if (n.rows <= kFewRows) attend_few_rows(call.in, call.out, call.lse, threads);
  else attend(call.in, call.out, call.lse, threads);
}

}  // namespace layalign::cpu::LAYALIGN_ISA
