// The gradients of out = residual + gate * softmax(query key^T * scale) value, from the saved log-sum-exp.
//
// With P = softmax, G = grad (without the gate, which may be 0 while dgate is not) and n <= S attended tokens:
//   dP = V G^T;  delta[t] = sum_s P dP;  dS = P (dP - delta);  dgate = sum_t delta
//   dV = gate P^T G;  dK = gate scale dS^T Q;  dQ = gate scale dS K
// P = 2^(score - lse) carries the rounding error of lse, several units of fp32; dividing by its own sum corrects that.
// Shapes: a task takes a part of the rows of one group, in blocks of kRowBlock; per block and kKeyBlock tokens it makes
// P^T and dP^T (keys, rows), lanes over the rows. Everything else needs delta, a sum over all s: up to kKept tokens the
// two panels are stored, above that they are computed twice.
// Arithmetic: 10 rows n d flop (14 above kKept); bytes: K, V, dK, dV once per block of rows, 16 n d, from L2 or L3.
// K and V are copied once for all rows of a task, up to kKept tokens. dK and dV are summed over a task's blocks in
// scratch; a single block writes the result directly. The number of parts depends on the shape only, and parts are
// added in order: the same bits for any number of threads.
// Scratch: per thread kRowBlock * (5 d + 2 n) + (2 n + kKeyBlock) * d floats for n = min(S, kKept) tokens; for dK and
// dV 2 S d per part, of which there are at most B G + kTasks. Linear in S, independent of T.
#include "gated_cross_attention.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kRowBlock = kMostRows;
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kTasks = 16;  // groups are split into parts until there are this many

struct Plan {
  int64_t pairs, parts, blocks;  // (b, g) pairs; parts of a pair's rows; blocks of rows in all parts together
  int64_t columns;               // rows of a block, rounded up to registers

  explicit Plan(const Sizes& n) : pairs(n.batch * n.groups), blocks(ceil_div(n.rows, kRowBlock)) {
    parts = pairs == 0 ? 0 : smaller(blocks, ceil_div(kTasks, pairs));
    columns = blocks == 0 ? 0 : round_up(ceil_div(n.rows, blocks), kLanes);
  }
};

struct Buffers {
  float *key, *value;                                          // of all tokens, or of kKeyBlock above kKept
  float* product;                                              // of kKeyBlock tokens
  float *query, *query_turned, *grad, *grad_turned, *dquery;   // of a block of rows
  float *powers, *dpowers;                                     // P^T and dP^T
  float *lse, *delta, *sums;                                   // one number per row
  int64_t columns;

  static int64_t panel_tokens(const Sizes& n) { return n.source <= kKept ? n.source : kKeyBlock; }
  static int64_t size(const Sizes& n, const Plan& plan) {
    return (2 * panel_tokens(n) + kKeyBlock) * n.width + plan.columns * (5 * n.width + 2 * panel_tokens(n) + 3);
  }
  Buffers(const Sizes& n, const Plan& plan, float* memory) : columns(plan.columns) {
    const int64_t panel = columns * n.width;
    key = memory;
    value = key + panel_tokens(n) * n.width;
    product = value + panel_tokens(n) * n.width;
    query = product + kKeyBlock * n.width;
    query_turned = query + panel;
    grad = query_turned + panel;
    grad_turned = grad + panel;
    dquery = grad_turned + panel;
    powers = dquery + panel;
    dpowers = powers + columns * panel_tokens(n);
    lse = dpowers + columns * panel_tokens(n);
    delta = lse + columns;
    sums = delta + columns;
  }
};

// The work on one block of rows of one group.
struct Block {
  const AttentionBackward& call;
  const Sizes& n;
  const Buffers& x;
  int64_t b, g, begin, rows;
  const int32_t* tokens;
  int64_t count;
  float gate;
  float *dkey, *dvalue;  // (count, width) sums; null: the results themselves are written
  bool first;            // of the blocks that the sums are of
  Left all_keys, all_values;  // kept: those of the task
  Places places;

  float* panel(float* of, int64_t from) const { return kept() ? of + from * x.columns : of; }
  bool kept() const { return n.source <= kKept; }
  Left keys_from(int64_t from, int64_t keys, bool whole) const {
    if (kept()) return rows_from(all_keys, from);
    return token_rows(call.in.key, n, b, g, tokens + from, keys, whole, true, x.key);
  }
  Left values_from(int64_t from, int64_t keys) const {
    if (kept()) return rows_from(all_values, from);
    return token_rows(call.in.value, n, b, g, tokens + from, keys, false, true, x.value);
  }

  void pack() const;
  void probabilities(int64_t from, int64_t keys) const;
  void add_sums(int64_t from, int64_t keys) const;
  void normalize() const;
  void score_gradients(int64_t from, int64_t keys) const;
  void token_gradient(const Tensor& to, float factor, int64_t from, int64_t keys, const float* left,
                      const float* right, float* sums) const;
  void query_gradient(int64_t from, int64_t keys) const;
  double run() const;
};

void Block::pack() const {
  const Attention& in = call.in;
  auto query = [&](int64_t i) { return at(in.query, b, places.head[i], places.token[i]); };
  auto grad = [&](int64_t i) { return at(call.grad, b, places.token[i], places.head[i]); };
  pack_rows(in.query.dtype, query, rows, n.size, n.width, x.query);
  pack_rows(call.grad.dtype, grad, rows, n.size, n.width, x.grad);
  pack_transposed(x.query, rows, n.width, in.scale * kLog2e, x.columns, x.query_turned);
  pack_transposed(x.grad, rows, n.width, 1, x.columns, x.grad_turned);
  const float* lse = static_cast<const float*>(call.lse.data) + b * n.heads * n.length;
  for (int64_t i = 0; i < x.columns; ++i) {  // with lse = inf the rows past the end have P = 0
    x.lse[i] = i < rows ? lse[places.head[i] * n.length + places.token[i]] : kInfinity;
    x.delta[i] = x.sums[i] = 0;
  }
}

// P^T and dP^T of tokens from .. from + keys.
void Block::probabilities(int64_t from, int64_t keys) const {
  float *powers = panel(x.powers, from), *dpowers = panel(x.dpowers, from);
  const Left key = keys_from(from, keys, false), value = values_from(from, keys);
  const int64_t vecs = x.columns / kLanes;
  multiply_deep(keys, vecs, n.size, key, Right{x.query_turned, x.columns}, powers);
  multiply_deep(keys, vecs, n.size, value, Right{x.grad_turned, x.columns}, dpowers);
  for (int64_t c = 0; c < x.columns; c += kLanes) {
    const Vec lse = load(count == 1 ? powers + c : x.lse + c);  // a single token's P is 1 and its dS 0, exactly
    for (int64_t i = c; i < c + keys * x.columns; i += x.columns) store(powers + i, exp2(load(powers + i) - lse));
  }
}

void Block::add_sums(int64_t from, int64_t keys) const {
  const float *powers = panel(x.powers, from), *dpowers = panel(x.dpowers, from);
  for (int64_t c = 0; c < x.columns; c += kLanes) {
    Vec delta{}, sums{};
    for (int64_t i = c; i < c + keys * x.columns; i += x.columns) {
      delta += load(powers + i) * load(dpowers + i);
      sums += load(powers + i);
    }
    store(x.delta + c, load(x.delta + c) + delta);
    store(x.sums + c, load(x.sums + c) + sums);
  }
}

// Applies P's factor 1 / sum to delta and to G (for dV); score_gradients applies it to dS.
void Block::normalize() const {
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = 1 / x.sums[i];
    x.sums[i] = factor;
    x.delta[i] *= factor;
    float* grad = x.grad + i * n.width;
    for (int64_t c = 0; c < n.width; c += kLanes) store(grad + c, load(grad + c) * factor);
  }
}

// dS, in place of dP.
void Block::score_gradients(int64_t from, int64_t keys) const {
  float *powers = panel(x.powers, from), *dpowers = panel(x.dpowers, from);
  for (int64_t c = 0; c < x.columns; c += kLanes) {
    const Vec delta = load(x.delta + c), factor = load(x.sums + c);
    for (int64_t i = c; i < c + keys * x.columns; i += x.columns) {
      store(dpowers + i, load(powers + i) * factor * (load(dpowers + i) - delta));
    }
  }
}

// dK or dV of some tokens: panel (keys, rows) times Q or G (rows, d).
void Block::token_gradient(
    const Tensor& to, float factor, int64_t from, int64_t keys, const float* left, const float* right,
    float* sums) const {
  const Left a{left, x.columns, 1};
  const Right b_{right, n.width};
  if (sums != nullptr && first) return multiply(keys, n.vecs, rows, a, b_, Overwrite{sums + from * n.width, n.width});
  if (sums != nullptr) return multiply(keys, n.vecs, rows, a, b_, Accumulate{sums + from * n.width, n.width});
  multiply(keys, n.vecs, rows, a, b_, Overwrite{x.product, n.width});
  for (int64_t s = 0; s < keys; ++s) {
    narrow_scaled(to.dtype, x.product + s * n.width, n.size, factor, at(to, b, g, tokens[from + s]));
  }
}

void Block::query_gradient(int64_t from, int64_t keys) const {
  const Left dscores{panel(x.dpowers, from), 1, x.columns};
  const Left key = keys_from(from, keys, true);
  const Right right{key.data, key.row};
  if (from == 0) multiply(rows, n.vecs, keys, dscores, right, Overwrite{x.dquery, n.width});
  else multiply(rows, n.vecs, keys, dscores, right, Accumulate{x.dquery, n.width});
}

// Returns the rows' share of dgate.
double Block::run() const {
  pack();
  const int64_t blocks = ceil_div(count, kKeyBlock);
  auto edge = [&](int64_t block) { return count * block / blocks; };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = edge(block), keys = edge(block + 1) - from;
    probabilities(from, keys);
    add_sums(from, keys);
  }
  normalize();
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = edge(block), keys = edge(block + 1) - from;
    if (!kept()) probabilities(from, keys);
    if (call.dvalue) token_gradient(call.dvalue, gate, from, keys, panel(x.powers, from), x.grad, dvalue);
    if (!call.dquery && !call.dkey) continue;
    score_gradients(from, keys);
    const float factor = gate * call.in.scale;
    if (call.dkey) token_gradient(call.dkey, factor, from, keys, panel(x.dpowers, from), x.query, dkey);
    if (call.dquery) query_gradient(from, keys);
  }
  constexpr int64_t kAhead = 4;
  for (int64_t i = 0; call.dquery && i < rows; ++i) {
    if (i + kAhead < rows) {
      const char* later = at(call.dquery, b, places.head[i + kAhead], places.token[i + kAhead]);
      expect(later, n.size * element_size(call.dquery.dtype), true);
    }
    narrow_scaled(call.dquery.dtype, x.dquery + i * n.width, n.size, gate * call.in.scale,
                  at(call.dquery, b, places.head[i], places.token[i]));
  }
  double dgate = 0;
  for (int64_t i = 0; i < rows; ++i) dgate += static_cast<double>(x.delta[i]);
  return dgate;
}

// dkey or dvalue of one group: the parts' sums (parts, S, width) added in order and stored at the attended tokens, zero
// at the others. Without parts the attended tokens are written already.
void store_tokens(
    const Sizes& n, const Attended& attended, const Tensor& to, int64_t b, int64_t g, int64_t parts, float factor,
    float* sums) {
  const int64_t count = attended.count(b);
  const int32_t* tokens = attended.of(b);
  for (int64_t s = 0, i = 0; s < n.source; ++s) {
    if (n.rows == 0 || i == count || tokens[i] != s) {
      zero_row(to, n.size, at(to, b, g, s));
      continue;
    }
    float* row = sums + i++ * n.width;
    if (parts == 0) continue;
    for (int64_t c = 0; c < n.width && parts > 1; c += kLanes) {
      Vec total = load(row + c);
      for (int64_t part = 1; part < parts; ++part) total += load(row + part * n.source * n.width + c);
      store(row + c, total);
    }
    narrow_scaled(to.dtype, row, n.size, factor, at(to, b, g, s));
  }
}

// What all tasks of a call share.
struct Whole {
  const AttentionBackward& call;
  const Sizes& n;
  const Plan& plan;
  const Attended& attended;
  float gate;
  int64_t sums;             // floats of dkey's or dvalue's sums of one task; 0 where the results themselves are written
  float *dkeys, *dvalues;   // of all tasks
  double* dgates;           // one per task

  int64_t edge(int64_t block) const { return n.rows * block / plan.blocks; }

  // dkey and dvalue of one group, after all of its parts.
  void store(int64_t pair) const {
    const int64_t b = pair / n.groups, g = pair % n.groups, parts = sums == 0 ? 0 : plan.parts, from = pair * parts * sums;
    if (call.dkey) store_tokens(n, attended, call.dkey, b, g, parts, gate * call.in.scale, dkeys + from);
    if (call.dvalue) store_tokens(n, attended, call.dvalue, b, g, parts, gate, dvalues + from);
  }

  void run(int64_t task, const Buffers& x) const {
    const int64_t pair = task / plan.parts, part = task % plan.parts, b = pair / n.groups, g = pair % n.groups;
    const int64_t first = plan.blocks * part / plan.parts, last = plan.blocks * (part + 1) / plan.parts;
    const int64_t count = attended.count(b);
    const int32_t* tokens = attended.of(b);
    dgates[task] = 0;
    for (int64_t i = edge(first); count == 0 && call.dquery && i < edge(last); ++i) {
      zero_row(call.dquery, n.size, at(call.dquery, b, n.head(g, i), n.token(i)));
    }
    Left keys{}, values{};
    if (n.source <= kKept && count > 0) {
      keys = token_rows(call.in.key, n, b, g, tokens, count, true, true, x.key);
      values = token_rows(call.in.value, n, b, g, tokens, count, false, true, x.value);
    }
    float* dkey = call.dkey && sums != 0 ? dkeys + task * sums : nullptr;
    float* dvalue = call.dvalue && sums != 0 ? dvalues + task * sums : nullptr;
    for (int64_t block = first; count > 0 && block < last; ++block) {
      const int64_t begin = edge(block), rows = edge(block + 1) - begin;
      const Block work{call, n,    x,      b,    g,      begin,          rows, tokens,
                       count, gate, dkey, dvalue, block == first, keys, values, Places(n, g, begin, rows)};
      dgates[task] += work.run();
    }
    if (plan.parts == 1) store(pair);  // still in the caches
  }
};

}  // namespace

void gated_cross_attention_backward(const AttentionBackward& call, int threads) {
  const Sizes n(call.in);
  const Plan plan(n);
  if (n.size == 0) return;
  const double steps = 5.0 * static_cast<double>(n.batch * n.heads * n.length) * static_cast<double>(n.source * n.size);
  threads = worth_threads(threads, steps / 3e3 / kLanes);
  const Attended attended(call.in.key_mask, n.batch, n.source);
  const int64_t tasks = plan.pairs * plan.parts, each = round_up(Buffers::size(n, plan), 16);
  const int64_t sums = plan.blocks > 1 ? n.source * n.width : 0;
  const Scratch memory(each * smaller(threads, tasks)), dgates(2 * tasks);
  const Scratch dkeys(call.dkey ? tasks * sums : 0), dvalues(call.dvalue ? tasks * sums : 0);
  const Whole whole{call, n, plan, attended, number(call.in.gate), sums, dkeys.data, dvalues.data,
                    reinterpret_cast<double*>(dgates.data)};
  parallel(tasks, threads, [&](int64_t task, int worker) {
    whole.run(task, Buffers(n, plan, memory.data + worker * each));
  });
  if (plan.parts != 1) parallel(plan.pairs, threads, [&](int64_t pair, int) { whole.store(pair); });
  if (!call.dgate) return;
  double dgate = 0;
  for (int64_t task = 0; task < tasks; ++task) dgate += whole.dgates[task];
  *static_cast<float*>(call.dgate.data) = static_cast<float>(dgate);
}

}  // namespace layalign::cpu::LAYALIGN_ISA
