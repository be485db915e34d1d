// Shared by the kernels of gated cross-attention: which source tokens are attended, and where a group's rows lie.
//
// The H / G heads that share a key/value head are one matrix of queries: row i of group g is head g * (H / G) + i / T,
// token i % T. Only attended tokens are read: padding costs nothing, and NaN in it has no influence.
#pragma once

#include "tiles.h"

namespace layalign::cpu::LAYALIGN_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

// For each batch row the attended source tokens in order; without a mask one list of all of them serves every row.
struct Attended {
  Scratch memory;
  int32_t* tokens;
  int32_t* counts;
  int64_t stride;

  Attended(const Tensor& mask, int64_t batch, int64_t length)
      : memory(mask ? batch * (length + 1) : length + 1),
        tokens(reinterpret_cast<int32_t*>(memory.data)),
        counts(tokens + (mask ? batch : 1) * length),
        stride(mask ? length : 0) {
    if (!mask) {
      for (int64_t s = 0; s < length; ++s) tokens[s] = static_cast<int32_t>(s);
      counts[0] = static_cast<int32_t>(length);
      return;
    }
    for (int64_t b = 0; b < batch; ++b) {
      const uint8_t* from = static_cast<const uint8_t*>(mask.data) + b * mask.stride[0];
      int32_t* to = tokens + b * stride;
      int32_t count = 0;
      for (int64_t s = 0; s < length; ++s) {
        to[count] = static_cast<int32_t>(s);
        count += from[s * mask.stride[1]] != 0;
      }
      counts[b] = count;
    }
  }
  const int32_t* of(int64_t b) const { return tokens + b * stride; }
  int64_t count(int64_t b) const { return counts[stride == 0 ? 0 : b]; }
};

struct Sizes {
  int64_t batch, heads, length, size, groups, source;  // B, H, T, d, G, S
  int64_t shared;                                      // H / G
  int64_t rows;                                        // H / G * T, of one group
  int64_t vecs, width;                                 // registers in a head, and the floats they hold

  explicit Sizes(const Attention& in)
      : batch(in.query.size[0]),
        heads(in.query.size[1]),
        length(in.query.size[2]),
        size(in.query.size[3]),
        groups(in.key.size[1]),
        source(in.key.size[2]),
        shared(groups == 0 ? 0 : heads / groups),
        rows(shared * length),
        vecs(ceil_div(size, kLanes)),
        width(vecs * kLanes) {}

  int64_t head(int64_t group, int64_t row) const { return group * shared + row / length; }
  int64_t token(int64_t row) const { return row % length; }
};

// Prefetches a row that is read or written soon: rows lie too far apart for the hardware prefetcher.
static inline void expect(const char* row, int64_t bytes, bool written) {
  for (int64_t line = 0; line < bytes; line += 64) {
    if (written) __builtin_prefetch(row + line, 1, 3);
    else __builtin_prefetch(row + line, 0, 3);
  }
}

// Head and token of a group's rows begin .. begin + rows - 1. One division serves all of them: per row it would show.
constexpr int64_t kMostRows = 64;
struct Places {
  int32_t head[kMostRows], token[kMostRows];

  Places(const Sizes& n, int64_t g, int64_t begin, int64_t rows) {
    int64_t h = n.head(g, begin), t = n.token(begin);
    for (int64_t i = 0; i < rows; ++i) {
      head[i] = static_cast<int32_t>(h), token[i] = static_cast<int32_t>(t);
      if (++t == n.length) t = 0, ++h;
    }
  }
};

// The rows found by `address`, as (count, width) floats.
template <typename Address>
static void pack_rows(DType type, const Address& address, int64_t count, int64_t size, int64_t width, float* to) {
  constexpr int64_t kAhead = 4;
  const int64_t bytes = size * element_size(type);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) expect(address(i + kAhead), bytes, false);
    widen(type, address(i), size, to + i * width);
  }
}

constexpr int64_t kKept = 4096;  // tokens of a group that a task keeps, as floats, for all its rows

// K or V of some attended tokens, (count, d) floats: in place where possible, else copied to `buffer`.
// `whole`: rows are padded to whole registers. `reused`: rows are read many times, so that copying distant ones side by
// side pays (rows at multiples of 4 KiB share a cache set).
static inline Left token_rows(
    const Tensor& x, const Sizes& n, int64_t b, int64_t g, const int32_t* tokens, int64_t count, bool whole,
    bool reused, float* buffer) {
  const int64_t stride = x.stride[2];
  const bool side_by_side = x.dtype == DType::float32 && tokens[count - 1] - tokens[0] == count - 1;
  if (side_by_side && (!whole || n.size == n.width) && (!reused || stride <= 2 * n.width)) {
    return {reinterpret_cast<const float*>(at(x, b, g, tokens[0])), stride, 1};
  }
  pack_rows(x.dtype, [&](int64_t s) { return at(x, b, g, tokens[s]); }, count, n.size, n.width, buffer);
  return {buffer, n.width, 1};
}

static inline Left rows_from(const Left& a, int64_t row) { return {a.data + row * a.row, a.row, a.step}; }

// (rows, width) as (width, columns), times `factor`; columns is a multiple of kLanes, those past `rows` are zero.
static inline void pack_transposed(
    const float* from, int64_t rows, int64_t width, float factor, int64_t columns, float* to) {
  Vec x[kLanes];
  for (int64_t i = 0; i < columns; i += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      for (int64_t r = 0; r < kLanes; ++r) x[r] = i + r < rows ? load(from + (i + r) * width + c) * factor : Vec{};
      transpose(x);
      for (int64_t r = 0; r < kLanes; ++r) store(to + (c + r) * columns + i, x[r]);
    }
  }
}

// Attention of few rows per group, without packing: lanes run over the head size. For decoding and short T.
constexpr int64_t kFewRows = kLanes / 2;
void attend_few_rows(const Attention& in, const Tensor& out, const Tensor& lse, int threads);
// The general case; `lse` may be absent.
void attend(const Attention& in, const Tensor& out, const Tensor& lse, int threads);

// out row = total * factor + residual, in out's type. `total` has whole registers.
static inline void finish_row(
    const Attention& in, const Sizes& n, const Tensor& out, int64_t b, int64_t t, int64_t h, float* total,
    float factor) {
  if (out.dtype == DType::float32 && n.size == n.width && (!in.residual || in.residual.dtype == DType::float32)) {
    const float* residual = in.residual ? reinterpret_cast<const float*>(at(in.residual, b, t, h)) : nullptr;
    float* to = reinterpret_cast<float*>(at(out, b, t, h));
    for (int64_t c = 0; c < n.width; c += kLanes) {
      const Vec value = load(total + c) * factor;
      store(to + c, residual == nullptr ? value : value + load(residual + c));
    }
    return;
  }
  for (int64_t c = 0; c < n.width; c += kLanes) store(total + c, load(total + c) * factor);
  if (in.residual) {
    float residual[kMaxHeadSize];
    widen(in.residual.dtype, at(in.residual, b, t, h), n.size, residual);
    for (int64_t c = 0; c < n.width; c += kLanes) store(total + c, load(total + c) + load(residual + c));
  }
  narrow(out.dtype, total, n.size, at(out, b, t, h));
}

}  // namespace layalign::cpu::LAYALIGN_ISA
