// x[j] = relu(sum_e weight[j, e] * hidden[e] + bias[j]) and its gradients.
//
// Shapes: a chunk of kChunk neighbouring positions (b, s, d) is a product (J, E) (E, kChunk). The E rows are copied
// side by side first, as float: they lie megabytes apart, at distances that often fall on the same cache sets.
// Arithmetic: 2 E J flop per position; bytes: (E + J) * element size. For E = 8, J = 24, fp32: 384 flop for 128 bytes,
// bound by memory; so large results bypass the caches, which saves reading what is about to be overwritten.
// Scratch: per thread E * kChunk floats forward, (E + J) * kChunk backward, and J * E floats per part backward.
#include "tiles.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kCachedBytes = 1 << 20;
constexpr int64_t kStreamedBytes = 2 << 20;  // results of this size and larger bypass the caches

// The positions as chunks of memory neighbours: one long row where all tensors are contiguous, else B * S rows of D.
struct Positions {
  int64_t batch, length, width;
  int64_t per_row, chunks;

  Positions(const Tensor* hidden, int layers, const Tensor* grad) {
    batch = hidden[0].size[0], length = hidden[0].size[1], width = hidden[0].size[2];
    bool flat = true;
    for (int e = 0; e < layers; ++e) flat = flat && contiguous(hidden[e].stride, 0);
    if (grad != nullptr) flat = flat && contiguous(grad->stride, 1);
    if (flat) width *= batch * length, batch = length = 1;
    per_row = ceil_div(width, kChunk);
    chunks = width == 0 ? 0 : batch * length * per_row;
  }
  bool contiguous(const int64_t* stride, int offset) const {
    return (length == 1 || stride[offset + 1] == width) && (batch == 1 || stride[offset] == length * width);
  }
};

struct Chunk {
  int64_t b, s, d, count;
  int64_t offset;  // in a contiguous (B, S, D) tensor

  Chunk(const Positions& n, int64_t i) {
    const int64_t row = i / n.per_row;
    b = row / n.length, s = row % n.length, d = i % n.per_row * kChunk;
    count = smaller(kChunk, n.width - d);
    offset = row * n.width + d;
  }
};

// weight as (J, E) floats.
void pack_weight(const Tensor& weight, float* to) {
  for (int64_t j = 0; j < weight.size[0]; ++j) {
    for (int64_t e = 0; e < weight.size[1]; ++e) {
      to[j * weight.size[1] + e] = number(weight, j * weight.stride[0] + e * weight.stride[1]);
    }
  }
}

// The E rows of a chunk, (E, kChunk), zeros after the chunk's end up to a whole register.
void pack_hidden(const Tensor* hidden, int64_t layers, const Chunk& chunk, float* to) {
  for (int64_t e = 0; e < layers; ++e) {
    widen(hidden[e].dtype, at(hidden[e], chunk.b, chunk.s, chunk.d), chunk.count, to + e * kChunk);
  }
}

// `count` columns of C to rows of T, `row` numbers apart.
template <typename T, bool kStreamed>
struct Rows {
  T* data;
  int64_t row, count;
  void put(int64_t i, int64_t column, Vec value) const {
    T* to = data + i * row + column;
    if (kStreamed) stream(to, value);
    else if (column + kLanes <= count) store(to, value);
    else store_first(to, value, count - column);
  }
};

// C = relu(bias[i] + A B)
template <typename T, bool kStreamed>
struct Relu {
  Rows<T, kStreamed> rows;
  const float* bias;
  Vec first(int64_t i, int64_t) const { return splat(bias[i]); }
  void last(int64_t i, int64_t column, Vec value) const { rows.put(i, column, relu(value)); }
};

// C = A B
template <typename T, bool kStreamed>
struct Narrow {
  Rows<T, kStreamed> rows;
  Vec first(int64_t, int64_t) const { return Vec{}; }
  void last(int64_t i, int64_t column, Vec value) const { rows.put(i, column, value); }
};

// Whether `rows` contiguous rows of `total` numbers may bypass the caches.
template <typename T>
bool streamable(const Positions& n, const Tensor& to, int64_t rows, int64_t total) {
  return rows * total * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes && n.width % (kStreamBytes / 2) == 0 &&
         total % (kStreamBytes / 2) == 0 && reinterpret_cast<uintptr_t>(to.data) % kStreamBytes == 0;
}

template <typename T>
void mix(const LayerMixForward& call, int threads) {
  const Positions n(call.hidden, call.layers, nullptr);
  const int64_t slots = call.weight.size[0], layers = call.layers, total = n.batch * n.length * n.width;
  threads = worth_threads(threads, static_cast<double>(slots * total) * sizeof(T) / 1.5e4);
  const bool streamed = streamable<T>(n, call.out, slots, total);
  const Scratch weight(slots * layers), bias(slots), memory(threads * layers * kChunk);
  pack_weight(call.weight, weight.data);
  for (int64_t j = 0; j < slots; ++j) bias.data[j] = call.bias ? number(call.bias, j * call.bias.stride[0]) : 0;

  // A result that stays in the caches gets one block per thread: a core finds there what it wrote in the last call.
  const int64_t tasks = smaller(n.chunks, slots * total * static_cast<int64_t>(sizeof(T)) < kCachedBytes ? threads : 1024);
  parallel(tasks, threads, [&](int64_t task, int worker) {
    float* hidden = memory.data + worker * layers * kChunk;
    for (int64_t i = n.chunks * task / tasks; i < n.chunks * (task + 1) / tasks; ++i) {
      const Chunk chunk(n, i);
      pack_hidden(call.hidden, layers, chunk, hidden);
      T* out = static_cast<T*>(call.out.data) + chunk.offset;
      const Left left{weight.data, layers, 1};
      const Right right{hidden, kChunk};
      const int64_t vecs = ceil_div(chunk.count, kLanes);
      if (streamed) multiply(slots, vecs, layers, left, right, Relu<T, true>{{out, total, chunk.count}, bias.data});
      else multiply(slots, vecs, layers, left, right, Relu<T, false>{{out, total, chunk.count}, bias.data});
    }
    if (streamed) stream_end();
  });
}

// -- backward ---------------------------------------------------------------------------------------------------------

// sum_each's square: R slots times K layers give kLanes sums at once.
constexpr int kSlotTile = kLanes == 16 ? 4 : kLanes == 8 ? 4 : 2;
constexpr int kLayerTile = kLanes / kSlotTile;

// sums[j, e] += sum_x grad[j, x] * hidden[e, x], for J and E rounded up to tiles; sums: (J, E) rounded up likewise.
void add_products(const float* grad, int64_t slots, const float* hidden, int64_t layers, int64_t count, float* sums) {
  for (int64_t j = 0; j < slots; j += kSlotTile) {
    for (int64_t e = 0; e < layers; e += kLayerTile) {
      Vec total[kLanes];
      LAYALIGN_UNROLL
      for (int i = 0; i < kLanes; ++i) total[i] = Vec{};
      for (int64_t x = 0; x < count; x += kLanes) {
        Vec right[kLayerTile];
        LAYALIGN_UNROLL
        for (int k = 0; k < kLayerTile; ++k) right[k] = load(hidden + (e + k) * kChunk + x);
        LAYALIGN_UNROLL
        for (int r = 0; r < kSlotTile; ++r) {
          const Vec left = load(grad + (j + r) * kChunk + x);
          LAYALIGN_UNROLL
          for (int k = 0; k < kLayerTile; ++k) total[r * kLayerTile + k] += left * right[k];
        }
      }
      float* to = sums + j * layers + e * kSlotTile;  // tile after tile
      store(to, load(to) + sum_each(total));
    }
  }
}

// g = grad where x > 0, else 0: one chunk of one slot, as float.
template <typename T>
void pack_gradient(const T* grad, const T* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(x + i + kChunk, 0, 2);  // the next chunk: the hardware prefetcher misses runs of 1 KiB
    __builtin_prefetch(grad + i + kChunk, 0, 2);
    store(to + i, load(x + i) > 0 ? load(grad + i) : Vec{});
  }
  if (i < count) store(to + i, load_first(x + i, count - i) > 0 ? load_first(grad + i, count - i) : Vec{});
}

// Each part of the positions has its own sums, which are added in order. Their number depends on the shape alone.
int64_t parts_of(const Positions& n) { return larger(1, smaller(32, n.chunks / 8)); }

template <typename T>
void mix_backward(const LayerMixBackward& call, int threads) {
  const Positions n(call.hidden, call.layers, &call.grad);
  const int64_t slots = call.weight.size[0], layers = call.layers, total = n.batch * n.length * n.width;
  const int64_t padded_slots = round_up(slots, kSlotTile), padded_layers = round_up(layers, kLayerTile);
  const int64_t parts = parts_of(n), part_sums = padded_slots * padded_layers + 2 * round_up(slots, 16);
  const bool wants_weight = bool(call.dweight);
  const bool streamed = call.dhidden && streamable<T>(n, call.dhidden, layers, total);
  threads = worth_threads(threads, static_cast<double>(slots * total * (32 + layers)) / 8e4);
  const Scratch weight(slots * layers), sums(wants_weight ? parts * part_sums : 0);
  const int64_t each = (padded_slots + padded_layers) * kChunk;
  const Scratch memory(threads * each);
  pack_weight(call.weight, weight.data);
  memset(memory.data, 0, sizeof(float) * static_cast<size_t>(threads * each));
  if (wants_weight) memset(sums.data, 0, sizeof(float) * static_cast<size_t>(parts * part_sums));

  parallel(parts, threads, [&](int64_t part, int worker) {
    float* grad = memory.data + worker * each;
    float* hidden = grad + padded_slots * kChunk;
    float* products = sums.data + part * part_sums;
    double* dbias = reinterpret_cast<double*>(products + padded_slots * padded_layers);
    for (int64_t i = n.chunks * part / parts; i < n.chunks * (part + 1) / parts; ++i) {
      const Chunk chunk(n, i);
      const int64_t vecs = ceil_div(chunk.count, kLanes);
      for (int64_t j = 0; j < slots; ++j) {
        const T* x = static_cast<const T*>(call.x.data) + j * total + chunk.offset;
        const int64_t from = j * call.grad.stride[0] + chunk.b * call.grad.stride[1] + chunk.s * call.grad.stride[2];
        pack_gradient(static_cast<const T*>(call.grad.data) + from + chunk.d, x, chunk.count, grad + j * kChunk);
      }
      if (call.dhidden) {
        T* dhidden = static_cast<T*>(call.dhidden.data) + chunk.offset;
        const Left left{weight.data, 1, layers};
        const Right right{grad, kChunk};
        if (streamed) multiply(layers, vecs, slots, left, right, Narrow<T, true>{{dhidden, total, chunk.count}});
        else multiply(layers, vecs, slots, left, right, Narrow<T, false>{{dhidden, total, chunk.count}});
      }
      if (!wants_weight) continue;
      pack_hidden(call.hidden, layers, chunk, hidden);
      add_products(grad, padded_slots, hidden, padded_layers, vecs * kLanes, products);
      for (int64_t j = 0; j < slots; ++j) {
        Vec all{};
        for (int64_t v = 0; v < vecs; ++v) all += load(grad + j * kChunk + v * kLanes);
        dbias[j] += static_cast<double>(sum(all));
      }
    }
    if (streamed) stream_end();
  });
  if (!wants_weight) return;
  for (int64_t j = 0; j < slots; ++j) {
    float* dweight = static_cast<float*>(call.dweight.data) + j * layers;
    const float* row = sums.data + j / kSlotTile * kSlotTile * padded_layers + j % kSlotTile * kLayerTile;
    for (int64_t e = 0; e < layers; ++e) {
      double whole = 0;
      for (int64_t part = 0; part < parts; ++part) {
        whole += static_cast<double>(row[part * part_sums + e / kLayerTile * kLanes + e % kLayerTile]);
      }
      dweight[e] = static_cast<float>(whole);
    }
    double whole = 0;
    for (int64_t part = 0; part < parts; ++part) {
      whole += reinterpret_cast<const double*>(sums.data + part * part_sums + padded_slots * padded_layers)[j];
    }
    static_cast<float*>(call.dbias.data)[j] = static_cast<float>(whole);
  }
}

}  // namespace

void layer_mix_forward(const LayerMixForward& call, int threads) {
  if (call.layers == 0 || call.weight.size[0] == 0) return;
  const DType type = call.hidden[0].dtype;
  if (type == DType::float32) mix<float>(call, threads);
  else if (type == DType::bfloat16) mix<BFloat>(call, threads);
  else mix<Half>(call, threads);
}

void layer_mix_backward(const LayerMixBackward& call, int threads) {
  if (call.layers == 0 || call.weight.size[0] == 0) return;
  const DType type = call.hidden[0].dtype;
  if (type == DType::float32) mix_backward<float>(call, threads);
  else if (type == DType::bfloat16) mix_backward<BFloat>(call, threads);
  else mix_backward<Half>(call, threads);
}

}  // namespace layalign::cpu::LAYALIGN_ISA
