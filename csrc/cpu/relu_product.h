// Products with the output of a relu: about half of it is zero, and the multiply-adds of zeros are skipped.
//
// C (M, N) = A (M, depth) B (depth, N), with zeros in A. B lies in tiles of kDepth rows and kWidth columns that fit the
// first-level cache. For every row of A and tile, the bits of a word say which numbers are not zero; the row walks over
// them: for each, one broadcast and kVecs multiply-adds with operands from the tile, the sums in registers. A core that
// can load a register with nearly every multiply-add runs this at the rate of a dense product, on half of the numbers.
// Only a zero times a finite number vanishes: where B has an infinity or NaN, and where A has few zeros, all of A is
// multiplied. A row's zeros fix the order of its sum: its bits do not depend on its neighbours.
#pragma once

#include "tiles.h"

namespace layalign::cpu::LAYALIGN_ISA {

constexpr int kVecs = 8;                            // registers across a tile
constexpr int64_t kWidth = kVecs * kLanes;          // columns of a tile
constexpr int64_t kDepth = kLanes == 16 ? 48 : 64;  // rows of a tile, of at most 24 KiB; no more than a word has bits

// Bit k says that from[k] is not zero (NaN is not), for k < count <= 64.
static inline uint64_t nonzero(const float* from, int64_t count) {
  uint64_t found = 0;
  int64_t k = 0;
#if defined(__AVX512F__)
  for (; k + kLanes <= count; k += kLanes) {
    const __mmask16 part = _mm512_cmp_ps_mask((__m512)load(from + k), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    found |= static_cast<uint64_t>(part) << k;
  }
#elif defined(__AVX2__)
  for (; k + kLanes <= count; k += kLanes) {
    const int part = _mm256_movemask_ps(_mm256_cmp_ps((__m256)load(from + k), _mm256_setzero_ps(), _CMP_NEQ_UQ));
    found |= static_cast<uint64_t>(part) << k;
  }
#endif
  for (; k < count; ++k) found |= static_cast<uint64_t>(from[k] != 0) << k;
  return found;
}

// The words of A's rows, (blocks, rows); returns the number of their bits.
static inline int64_t mark(const float* a, int64_t row, int64_t rows, int64_t depth, uint64_t* words) {
  int64_t found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const uint64_t word = nonzero(a + i * row + k, smaller(kDepth, depth - k));
      words[k / kDepth * rows + i] = word;
      found += __builtin_popcountll(word);
    }
  }
  return found;
}

// Rows of A, `row` numbers apart, times a tile.
struct Step {
  const float* a;
  int64_t row, rows;
  const uint64_t* words;
  const float* tile;
  const float* ahead;  // the next tile, prefetched meanwhile; or null
};

// Where a row's sums of one tile go: to (rows, kWidth) sums, or onto those of the tiles before it.
struct ToSums {
  float* sums;
  bool add;
  void operator()(int64_t i, int v, Vec total) const {
    float* to = sums + i * kWidth + v * kLanes;
    store(to, add ? total + load(to) : total);
  }
};

template <int kCount, typename Out>
static void multiply_marked(const Step& step, const Out& out) {
  constexpr int64_t kLines = kDepth * kWidth * 4 / 64;
  const int64_t lines = step.ahead == nullptr ? 0 : ceil_div(kLines, step.rows);  // with each row
  const char* ahead = reinterpret_cast<const char*>(step.ahead);
  const float* a = step.a;
  for (int64_t i = 0; i < step.rows; ++i, a += step.row) {
    for (int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    Vec total[kCount];
    LAYALIGN_UNROLL
    for (int v = 0; v < kCount; ++v) total[v] = Vec{};
    for (uint64_t left = step.words[i]; left != 0; left &= left - 1) {
      const int64_t k = __builtin_ctzll(left);
      const Vec one = splat(a[k]);
      const float* from = step.tile + k * kWidth;
#if defined(__x86_64__)
      asm("" : "+r"(from));  // an address of two registers would cost another instruction
#endif
      LAYALIGN_UNROLL
      for (int v = 0; v < kCount; ++v) total[v] += one * load(from + v * kLanes);
    }
    LAYALIGN_UNROLL
    for (int v = 0; v < kCount; ++v) out(i, v, total[v]);
  }
}

// For `columns` of the tile, up to whole registers.
template <typename Out>
static void multiply_marked(const Step& step, int64_t columns, const Out& out) {
  switch (ceil_div(columns, kLanes)) {
    case 1: return multiply_marked<1>(step, out);
    case 2: return multiply_marked<2>(step, out);
    case 3: return multiply_marked<3>(step, out);
    case 4: return multiply_marked<4>(step, out);
    case 5: return multiply_marked<5>(step, out);
    case 6: return multiply_marked<6>(step, out);
    case 7: return multiply_marked<7>(step, out);
    default: return multiply_marked<8>(step, out);
  }
}

// The same with the zeros: `depth` numbers of each row.
static void multiply_full(const Step& step, int64_t depth, int64_t columns, const ToSums& out) {
  const Left a{step.a, step.row, 1};
  const Right b{step.tile, kWidth};
  const int64_t vecs = ceil_div(columns, kLanes);
  if (out.add) multiply(step.rows, vecs, depth, a, b, Accumulate{out.sums, kWidth});
  else multiply(step.rows, vecs, depth, a, b, Overwrite{out.sums, kWidth});
}

// The number of parts, at most `most`, to split each of `tasks` tasks into, so that all threads stay busy.
static inline int64_t parts_for(int64_t tasks, int64_t most, int threads) {
  return larger(1, smaller(most, ceil_div(2 * threads, larger(tasks, 1))));
}

}  // namespace layalign::cpu::LAYALIGN_ISA
