// y[j] = relu(sum_e mix[j, e] * hidden[e] + mix_bias[j]) @ weight[j].T + bias[j]. The relu's result x stays in scratch.
//
// Shapes: a task takes some slots and up to kRows rows. It mixes x (slots, rows, K), kMixed floats at most or one slot,
// and multiplies slot after slot by the tiles of its packed weight (relu_product.h).
// Arithmetic: rows (E K + non-zero share of K N) multiply-adds per slot; bytes: the weight once per kRows rows, one
// tile prefetched; hidden once per group of slots, so that it pays only where E is small against slots * N.
// Scratch per thread: kMixed + kRows * (kWidth + K / 16) floats, 1.1 MiB for K = 512: a second-level cache.
#include "relu_product.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kRows = 64;
constexpr int64_t kMixed = 1 << 18;          // floats of x in scratch: 1 MiB
constexpr int64_t kAhead = 2;                // states are prefetched so many tokens ahead
constexpr int64_t kStreamedBytes = 2 << 20;  // results of this size and larger bypass the caches
constexpr double kWorthwhile = 0.85;         // above this non-zero share of x, zeros are multiplied too

// The states of one token in all layers, and the mix of some slots.
struct Mix {
  const float* const* states;  // (E), of D_e each
  int64_t layers;
  const float *weight, *bias;  // (slots, E), (slots)
  float* x;                    // of the token, slots `step` apart
  int64_t step, ahead;         // the states to prefetch lie `ahead` floats after these
};

// x of kSlots slots, kVecs registers from `column` on, of the last one `last` numbers.
template <int kSlots, int kVecs>
inline void mix_tile(const Mix& mix, int64_t slot, int64_t column, int64_t last = kLanes) {
  Vec total[kSlots][kVecs];
  LAYALIGN_UNROLL
  for (int j = 0; j < kSlots; ++j) {
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) total[j][v] = splat(mix.bias[slot + j]);
  }
  for (int64_t e = 0; e < mix.layers; ++e) {
    const float* from = mix.states[e] + column;
    Vec loaded[kVecs];
    if (slot == 0) {
      LAYALIGN_UNROLL
      for (int v = 0; v < kVecs; v += 64 / (4 * kLanes)) __builtin_prefetch(from + v * kLanes + mix.ahead, 0, 2);
    }
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) loaded[v] = last == kLanes ? load(from + v * kLanes) : load_first(from, last);
    LAYALIGN_UNROLL
    for (int j = 0; j < kSlots; ++j) {
      const Vec one = splat(mix.weight[(slot + j) * mix.layers + e]);
      LAYALIGN_UNROLL
      for (int v = 0; v < kVecs; ++v) total[j][v] += one * loaded[v];
    }
  }
  LAYALIGN_UNROLL
  for (int j = 0; j < kSlots; ++j) {
    float* to = mix.x + (slot + j) * mix.step + column;
    LAYALIGN_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      if (last == kLanes) store(to + v * kLanes, relu(total[j][v]));
      else store_first(to, relu(total[j][v]), last);
    }
  }
}

template <int kSlots>
void mix_columns(const Mix& mix, int64_t slot, int64_t columns) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) mix_tile<kSlots, 2>(mix, slot, c);
  if (c + kLanes <= columns) mix_tile<kSlots, 1>(mix, slot, c), c += kLanes;
  if (c < columns) mix_tile<kSlots, 1>(mix, slot, c, columns - c);
}

void mix_token(const Mix& mix, int64_t slots, int64_t columns) {
  constexpr int kTogether = kRegisters == 32 ? 8 : 4;  // with two registers each, they and their states fit
  int64_t j = 0;
  for (; j + kTogether <= slots; j += kTogether) mix_columns<kTogether>(mix, j, columns);
  if constexpr (kTogether > 4) {
    if (j + 4 <= slots) mix_columns<4>(mix, j, columns), j += 4;
  }
  if (j + 2 <= slots) mix_columns<2>(mix, j, columns), j += 2;
  if (j < slots) mix_columns<1>(mix, j, columns);
}

// The last tile of a row's sum: adds the earlier ones and the bias, and stores the result.
struct ToResult {
  ToSums before;
  const Vec* bias;
  float* data;
  int64_t row;
  bool streamed;
  void operator()(int64_t i, int v, Vec total) const {
    if (before.add) total += load(before.sums + i * kWidth + v * kLanes);
    float* to = data + i * row + v * kLanes;
    if (streamed) stream(to, total + bias[v]);
    else store(to, total + bias[v]);
  }
};

struct Sizes {
  int64_t slots, layers, batch, length, rows, depth, columns;  // 2L, E, B, S, B * S, D_e, D_out
  int64_t tiles, blocks;
  int64_t row_parts, groups;  // of the rows and of the slots

  Sizes(const LayerProjectionForward& call, int threads)
      : slots(call.mix_weight.size[0]),
        layers(call.layers),
        batch(call.hidden[0].size[0]),
        length(call.hidden[0].size[1]),
        rows(batch * length),
        depth(call.hidden[0].size[2]),
        columns(call.out[0].size[2]),
        tiles(ceil_div(columns, kWidth)),
        blocks(ceil_div(depth, kDepth)),
        row_parts(ceil_div(rows, kRows)) {
    const int64_t together = smaller(slots, larger(1, kMixed / larger(1, kRows * depth)));
    groups = ceil_div(slots, together);
    groups *= parts_for(groups * row_parts, together, threads);
    groups = smaller(groups, slots);
  }
  int64_t group_slots() const { return ceil_div(slots, groups); }
};

struct Buffers {
  float *x, *sums;
  const float** states;
  uint64_t* words;

  static int64_t size(const Sizes& n) {
    return round_up(n.group_slots() * kRows * n.depth, 16) + kRows * (kWidth + 2 * n.blocks) + 2 * n.layers;
  }
  Buffers(const Sizes& n, float* memory) : x(memory) {
    sums = x + round_up(n.group_slots() * kRows * n.depth, 16);
    words = reinterpret_cast<uint64_t*>(sums + kRows * kWidth);
    states = reinterpret_cast<const float**>(words + kRows * n.blocks);
  }
};

// Some slots and rows of one call.
struct Part {
  const LayerProjectionForward& call;
  const Sizes& n;
  const Buffers& own;
  const float *mix_weight, *mix_bias;
  int64_t first, rows;
  bool streamed;

  void mix(int64_t slot, int64_t slots) const {
    const float *weight = mix_weight + slot * n.layers, *bias = mix_bias + slot;
    const int64_t step = rows * n.depth, ahead = kAhead * call.hidden[0].stride[1];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = (first + i) / n.length, s = (first + i) % n.length;
      for (int64_t e = 0; e < n.layers; ++e) own.states[e] = reinterpret_cast<const float*>(at(call.hidden[e], b, s));
      mix_token({own.states, n.layers, weight, bias, own.x + i * n.depth, step, ahead}, slots, n.depth);
    }
  }

  void project(int64_t slot, const float* x) const {
    const int64_t found = mark(x, n.depth, rows, n.depth, own.words);
    const bool sparse = call.finite && static_cast<double>(found) <= kWorthwhile * static_cast<double>(rows * n.depth);
    const float* weight = floats(call.packed) + (call.packed.size[0] == 1 ? 0 : slot) * n.tiles * n.depth * kWidth;
    for (int64_t t = 0; t < n.tiles; ++t) {
      const int64_t column = t * kWidth, wide = smaller(kWidth, n.columns - column);
      const bool direct = sparse && wide % kLanes == 0;  // the last sums need not wait for the bias in scratch
      float* to = static_cast<float*>(call.out[slot].data) + first * n.columns + column;
      Vec start[kVecs] = {};
      if (call.bias) load_row(floats(call.bias) + slot * call.bias.stride[0] + column, wide, start);
      for (int64_t k = 0; k < n.depth; k += kDepth) {
        const float* tile = weight + (t * n.depth + k) * kWidth;
        const uint64_t* words = own.words + k / kDepth * rows;
        const Step step{x + k, n.depth, rows, words, tile, tile + kDepth * kWidth};
        const ToSums sums{own.sums, k > 0};
        if (direct && k + kDepth >= n.depth) {
          multiply_marked(step, wide, ToResult{sums, start, to, n.columns, streamed});
        } else if (sparse) {
          multiply_marked(step, wide, sums);
        } else {
          multiply_full(step, smaller(kDepth, n.depth - k), wide, sums);
        }
      }
      if (!direct) put(start, to, wide);
    }
  }

  // The sums and the bias, to `columns` of the result.
  void put(const Vec* start, float* to, int64_t columns) const {
    const float* sums = own.sums;
    for (int64_t i = 0; i < rows; ++i, sums += kWidth, to += n.columns) {
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        const Vec value = load(sums + c) + start[c / kLanes];
        if (streamed) stream(to + c, value);
        else store(to + c, value);
      }
      if (c < columns) store_first(to + c, load(sums + c) + start[c / kLanes], columns - c);
    }
  }
};

bool streamable(const LayerProjectionForward& call, const Sizes& n) {
  bool aligned = n.columns % (kStreamBytes / 4) == 0 && n.slots * n.rows * n.columns * 4 >= kStreamedBytes;
  for (int64_t j = 0; j < n.slots; ++j) {
    aligned = aligned && reinterpret_cast<uintptr_t>(call.out[j].data) % kStreamBytes == 0;
  }
  return aligned;
}

}  // namespace

int64_t packed_width() { return kWidth; }

bool pack_weight(const PackWeight& call, int threads) {
  const int64_t slots = call.weight.size[0], columns = call.weight.size[1], depth = call.weight.size[2];
  const int64_t tiles = ceil_div(columns, kWidth);
  const Scratch whole(slots * tiles);
  parallel(slots * tiles, threads, [&](int64_t task, int) {
    const int64_t j = task / tiles, column = task % tiles * kWidth, count = smaller(kWidth, columns - column);
    const float* from = floats(call.weight) + j * call.weight.stride[0] + column * call.weight.stride[1];
    float* to = static_cast<float*>(call.packed.data) + task * depth * kWidth;
    if (count < kWidth) memset(to, 0, sizeof(float) * static_cast<size_t>(depth * kWidth));
    whole.data[task] = transpose(from, call.weight.stride[1], count, depth, to, kWidth) ? 1.0f : 0.0f;
  });
  bool all = true;
  for (int64_t task = 0; task < slots * tiles; ++task) all = all && whole.data[task] != 0;
  return all;
}

void layer_projection_forward(const LayerProjectionForward& call, int threads) {
  const Sizes n(call, threads);
  if (n.rows * n.columns == 0) return;
  const int64_t each = round_up(Buffers::size(n), 16);
  const Scratch memory(threads * each), mix_weight(n.slots * n.layers), mix_bias(n.slots);
  for (int64_t j = 0; j < n.slots; ++j) {
    const Tensor& weight = call.mix_weight;
    for (int64_t e = 0; e < n.layers; ++e) {
      mix_weight.data[j * n.layers + e] = number(weight, j * weight.stride[0] + e * weight.stride[1]);
    }
    mix_bias.data[j] = call.mix_bias ? number(call.mix_bias, j * call.mix_bias.stride[0]) : 0;
  }
  const bool streamed = streamable(call, n);

  parallel(n.groups * n.row_parts, threads, [&](int64_t task, int worker) {
    const int64_t group = task / n.row_parts, row_part = task % n.row_parts;
    const int64_t first = n.rows * row_part / n.row_parts, rows = n.rows * (row_part + 1) / n.row_parts - first;
    const int64_t slot = n.slots * group / n.groups, last = n.slots * (group + 1) / n.groups;
    const Buffers own(n, memory.data + worker * each);
    const Part part{call, n, own, mix_weight.data, mix_bias.data, first, rows, streamed};
    part.mix(slot, last - slot);
    for (int64_t j = slot; j < last; ++j) part.project(j, own.x + (j - slot) * rows * n.depth);
    if (streamed) stream_end();
  });
}

}  // namespace layalign::cpu::LAYALIGN_ISA
