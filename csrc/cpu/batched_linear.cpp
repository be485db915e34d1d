// out[j] = x[j] @ weight[j].T + bias[j], or x[j] @ weight[j] + bias[j], for all j in one call.
//
// Shapes: a task computes kColumns columns of one j, for up to kRows rows. It walks over the depth in steps of kSlice:
// that part of the weight is copied to a tile (kSlice, kColumns) in the caches, transposed where `transposed` says so,
// and every row is multiplied by it.
// Arithmetic: R K N multiply-adds per j; bytes: the weight once per kRows rows. With few rows a library's product
// spends most of its time packing the weight, in every call; here that is one pass over it in the caches.
// The order of every sum depends on K alone: a row's bits do not depend on its neighbours, nor on the threads.
// Scratch per thread: a tile of at most 48 KiB.
#include "tiles.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kRows = 256;
constexpr int64_t kColumns = kPanel * kLanes * (kLanes == 16 ? 1 : 2);
constexpr int64_t kSlice = 192;

// The sum over one part of the depth, added to the bias or to the sum of the earlier parts.
struct ToRows {
  float* data;
  int64_t row, columns;
  const Vec* bias;  // of the first part, else null
  Vec first(int64_t, int64_t) const { return Vec{}; }
  void last(int64_t i, int64_t column, Vec value) const {
    float* to = data + i * row + column;
    if (column + kLanes <= columns) {
      store(to, value + (bias ? bias[column / kLanes] : load(to)));
    } else {
      const int64_t count = columns - column;
      store_first(to, value + (bias ? bias[column / kLanes] : load_first(to, count)), count);
    }
  }
};

}  // namespace

void batched_linear(const BatchedLinear& call, int threads) {
  const int64_t rows = call.x[0].size[0], depth = call.x[0].size[1], columns = call.out[0].size[1];
  if (rows * columns == 0) return;
  const int64_t panels = ceil_div(columns, kColumns), parts = ceil_div(rows, kRows);
  const Scratch tiles(threads * kSlice * kColumns);

  parallel(call.count * panels * parts, threads, [&](int64_t task, int worker) {
    const int64_t j = task / (panels * parts), column = task / parts % panels * kColumns, part = task % parts;
    const int64_t row = rows * part / parts, count = rows * (part + 1) / parts - row;
    const int64_t wide = smaller(kColumns, columns - column);
    float* tile = tiles.data + worker * kSlice * kColumns;
    const Tensor &x = call.x[j], &weight = call.weight[j], &bias = call.bias[j], &out = call.out[j];
    Vec start[kColumns / kLanes] = {};
    if (bias) load_row(floats(bias) + column, wide, start);
    const float* left = floats(x) + row * x.stride[0];
    float* to = static_cast<float*>(out.data) + row * out.stride[0] + column;
    const int64_t step = weight.stride[0];
    for (int64_t k = 0; k < larger(depth, 1); k += kSlice) {
      const int64_t deep = smaller(kSlice, depth - k);
      if (call.transposed) transpose(floats(weight) + column * step + k, step, wide, deep, tile, kColumns);
      else copy_rows(floats(weight) + k * step + column, step, deep, wide, tile, kColumns);
      const ToRows sums{to, out.stride[0], wide, k == 0 ? start : nullptr};
      multiply(count, ceil_div(wide, kLanes), deep, Left{left + k, x.stride[0], 1}, Right{tile, kColumns}, sums);
    }
  });
}

}  // namespace layalign::cpu::LAYALIGN_ISA
