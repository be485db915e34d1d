// dweight[j] += x[j].T @ grad[j], skipping the zeros of x, the relu's result (relu_product.h).
//
// Shapes: a task takes up to kRows of x's columns and kPanels tiles of grad's, and goes through the rows of all slots
// that share a weight: x is transposed, kSegment rows at a time, and grad copied to tiles.
// Arithmetic: non-zero share of R K N multiply-adds per slot; bytes: grad once per task's columns of x.
// The order of every sum depends on the shape and x's zeros only: the same bits for any number of threads.
// Scratch per thread: kRows * (kSegment * 33 / 32 + kPanels * kWidth) floats and a tile, at most 0.7 MiB.
#include "relu_product.h"

namespace layalign::cpu::LAYALIGN_ISA {
namespace {

constexpr int64_t kRows = 128;
constexpr int64_t kSegment = 4 * kDepth;
constexpr int64_t kPanels = 8;
constexpr double kWorthwhile = 0.85;  // above this non-zero share of x, zeros are multiplied too

struct Buffers {
  static constexpr int64_t kFloats = kRows * (kSegment + kSegment / kDepth * 2 + kPanels * kWidth) + kDepth * kWidth;
  float *tile, *transposed, *sums;
  uint64_t* words;

  explicit Buffers(float* memory) : tile(memory) {
    transposed = tile + kDepth * kWidth;
    sums = transposed + kRows * kSegment;
    words = reinterpret_cast<uint64_t*>(sums + kRows * kPanels * kWidth);
  }
};

// Some of x's columns, `count` from `begin`, against some tiles of grad: their part of dweight.
struct Part {
  const LayerProjectionBackward& call;
  const Buffers& own;
  int64_t begin, count, first_tile, last_tile;

  float* sums(int64_t t) const { return own.sums + (t - first_tile) * kRows * kWidth; }

  void add_segment(const float* x, const Tensor& grad, int64_t row, int64_t depth) const {
    const int64_t width = call.x.size[2], columns = call.dweight.size[2];
    transpose(x + row * width + begin, width, depth, count, own.transposed, kSegment);
    const int64_t found = mark(own.transposed, kSegment, count, depth, own.words);
    const bool zeros = static_cast<double>(found) <= kWorthwhile * static_cast<double>(count * depth);
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const int64_t column = t * kWidth, wide = smaller(kWidth, columns - column);
      const float* from = floats(grad) + row * grad.stride[0] + column;
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t deep = smaller(kDepth, depth - k);
        const bool whole = copy_rows(from + k * grad.stride[0], grad.stride[0], deep, wide, own.tile, kWidth);
        const uint64_t* words = own.words + k / kDepth * count;
        const Step step{own.transposed + k, kSegment, count, words, own.tile, nullptr};
        const ToSums to{sums(t), true};
        if (whole && zeros) multiply_marked(step, wide, to);
        else multiply_full(step, deep, wide, to);
      }
    }
  }

  // For the slots first .. last - 1, whose dweight is the group's.
  void run(int64_t group, int64_t first, int64_t last) const {
    const int64_t rows = call.x.size[1], width = call.x.size[2], columns = call.dweight.size[2];
    memset(own.sums, 0, sizeof(float) * static_cast<size_t>((last_tile - first_tile) * kRows * kWidth));
    for (int64_t j = first; j < last; ++j) {
      for (int64_t row = 0; call.grad[j] && row < rows; row += kSegment) {
        add_segment(floats(call.x) + j * rows * width, call.grad[j], row, smaller(kSegment, rows - row));
      }
    }
    float* dweight = static_cast<float*>(call.dweight.data) + (group * width + begin) * columns;
    for (int64_t t = first_tile; t < last_tile; ++t) {
      const int64_t column = t * kWidth, wide = smaller(kWidth, columns - column);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < wide; ++c) dweight[i * columns + column + c] += sums(t)[i * kWidth + c];
      }
    }
  }
};

}  // namespace

void layer_projection_backward(const LayerProjectionBackward& call, int threads) {
  const int64_t slots = call.x.size[0], width = call.x.size[2], columns = call.dweight.size[2];
  if (call.x.size[1] * columns == 0) return;
  const bool shared = call.dweight.size[0] == 1;
  const int64_t groups = shared ? 1 : slots, tiles = ceil_div(columns, kWidth), tile_parts = ceil_div(tiles, kPanels);
  // Each part of x's columns copies all of grad, so there are no more parts than the threads need.
  const int64_t tasks = groups * tile_parts, least = ceil_div(width, kRows);
  const int64_t parts = larger(least, parts_for(tasks, ceil_div(width, 2 * kLanes), threads));
  const Scratch memory(threads * Buffers::kFloats);

  parallel(tasks * parts, threads, [&](int64_t task, int worker) {
    const int64_t group = task / (tile_parts * parts), tile_part = task / parts % tile_parts, part = task % parts;
    const int64_t begin = width * part / parts, end = width * (part + 1) / parts;
    const int64_t first_tile = tiles * tile_part / tile_parts, last_tile = tiles * (tile_part + 1) / tile_parts;
    const Buffers own(memory.data + worker * Buffers::kFloats);
    const Part work{call, own, begin, end - begin, first_tile, last_tile};
    work.run(group, shared ? 0 : group, shared ? slots : group + 1);
  });
}

}  // namespace layalign::cpu::LAYALIGN_ISA
