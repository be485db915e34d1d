// What a program that checks kernels needs: tensors in memory of their exact size, and the formulas of layalign.h as
// plain loops in double precision. Every result comes with the sum of the sizes of its terms, to which rounding errors
// are proportional. Header only; the program picks the kernels and the bounds.
#pragma once

#include "../layalign.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace layalign::naive {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kFloatEps = 0x1p-23;

inline std::mt19937_64 generator(1);
inline int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
inline double normal() { return std::normal_distribution<double>()(generator); }
template <typename T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[below(static_cast<int64_t>(choices.size()))];
}

// -- numbers ----------------------------------------------------------------------------------------------------------

inline int64_t bytes_of(DType type) { return type == DType::float32 ? 4 : type == DType::boolean ? 1 : 2; }
inline double eps_of(DType type) {
  return type == DType::float32 ? 0x1p-23 : type == DType::float16 ? 0x1p-10 : 0x1p-7;
}
inline const char* name_of(DType type) {
  return type == DType::float32 ? "fp32" : type == DType::float16 ? "fp16" : "bf16";
}

inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) value = mantissa != 0 ? kNan : kInfinity;
  return bits & 0x8000 ? -value : value;
}

inline uint16_t half_bits(double value) {  // to nearest, ties to even
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent;
  std::frexp(size, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  const double whole = std::nearbyint(size / unit) * unit;
  std::frexp(whole, &exponent);
  if (whole < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<int>(whole * 0x1p24));
  const int mantissa = static_cast<int>(std::ldexp(whole, 11 - exponent)) - 1024;
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | mantissa);
}

inline double read(const void* data, DType type, int64_t i) {
  if (type == DType::float32) return static_cast<const float*>(data)[i];
  if (type == DType::boolean) return static_cast<const uint8_t*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == DType::float16) return half_value(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void write(void* data, DType type, int64_t i, double value) {
  if (type == DType::float32) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  } else if (type == DType::boolean) {
    static_cast<uint8_t*>(data)[i] = value != 0;
  } else if (type == DType::float16) {
    static_cast<uint16_t*>(data)[i] = half_bits(value);
  } else {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = std::isnan(value) ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
  }
}

// -- tensors ----------------------------------------------------------------------------------------------------------

// A tensor in heap memory of its exact size. `order`: which dimension lies outermost, ... innermost; `gap`: elements
// left out after each innermost row; `shift`: elements before the first. Everything is NaN at first (or false).
struct Array : Tensor {
  std::shared_ptr<void> memory;
  int64_t elements = 0, before = 0;

  Array() = default;
  Array(DType type, std::vector<int64_t> sizes, std::vector<int> order = {}, int64_t gap = 0, int64_t shift = 0) {
    dtype = type;
    dims = static_cast<int>(sizes.size());
    if (order.empty()) {
      for (int i = 0; i < dims; ++i) order.push_back(i);
    }
    int64_t step = 1, count = 1;
    for (int i = dims - 1; i >= 0; --i) {
      const int axis = order[static_cast<size_t>(i)];
      size[axis] = sizes[static_cast<size_t>(axis)];
      stride[axis] = step;
      step = step * size[axis] + (i == dims - 1 ? gap : 0);
      count *= size[axis];
    }
    elements = count == 0 ? 0 : 1;
    for (int i = 0; i < dims && count != 0; ++i) elements += (size[i] - 1) * stride[i];
    before = shift;
    allocate();
  }

  int64_t offset(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
  double operator()(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return read(data, dtype, offset(i, j, k, l));
  }
  template <typename Function>
  void each(const Function& function) const {
    const int64_t n[4] = {size[0], dims > 1 ? size[1] : 1, dims > 2 ? size[2] : 1, dims > 3 ? size[3] : 1};
    for (int64_t i = 0; i < n[0]; ++i)
      for (int64_t j = 0; j < n[1]; ++j)
        for (int64_t k = 0; k < n[2]; ++k)
          for (int64_t l = 0; l < n[3]; ++l) function(i, j, k, l);
  }
  Array& fill(double spread = 1) {
    each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
      write(data, dtype, offset(i, j, k, l), spread * normal());
    });
    return *this;
  }
  Array fresh() const {  // the same tensor elsewhere, all NaN
    Array other = *this;
    other.allocate();
    return other;
  }

 private:
  void allocate() {
    const int64_t bytes = bytes_of(dtype);
    memory.reset(std::malloc(static_cast<size_t>(std::max<int64_t>(1, (elements + before) * bytes))), std::free);
    data = static_cast<char*>(memory.get()) + before * bytes;
    for (int64_t i = 0; i < elements; ++i) write(data, dtype, i, dtype == DType::boolean ? 0 : kNan);
  }
};

// An exact result: values, and per value the sum of the sizes of its terms (what rounding errors are relative to).
struct Exact {
  std::vector<double> value, terms;
  explicit Exact(int64_t count) : value(static_cast<size_t>(count)), terms(static_cast<size_t>(count)) {}
};

// -- layer mix --------------------------------------------------------------------------------------------------------

struct MixCase {
  int64_t batch, length, width, layers, slots;
  DType type;
  std::string text() const {
    return "B" + std::to_string(batch) + " S" + std::to_string(length) + " D" + std::to_string(width) + " E" +
           std::to_string(layers) + " J" + std::to_string(slots);
  }
};

// -- attention --------------------------------------------------------------------------------------------------------

struct AttentionCase {
  int64_t batch, heads, groups, length, source, size;
  DType type;
  std::string text() const {
    return "B" + std::to_string(batch) + " H" + std::to_string(heads) + " G" + std::to_string(groups) + " T" +
           std::to_string(length) + " S" + std::to_string(source) + " d" + std::to_string(size);
  }
};

struct AttentionData {
  Array query, key, value, gate, residual, mask, grad;
  bool masked, with_residual;
  double scale;
};

// Everything exact: the forward's results and the gradients.
struct AttentionExact {
  Exact out, lse, dquery, dkey, dvalue, dgate;
  double spread = 0;  // the largest sum of |query * key| * scale: what a score's rounding is relative to
  AttentionExact(const AttentionCase& n)
      : out(n.batch * n.length * n.heads * n.size),
        lse(n.batch * n.heads * n.length),
        dquery(n.batch * n.heads * n.length * n.size),
        dkey(n.batch * n.groups * n.source * n.size),
        dvalue(n.batch * n.groups * n.source * n.size),
        dgate(1) {}
};

// One row of queries.
inline void exact_row(const AttentionCase& n, const AttentionData& x, int64_t b, int64_t h, int64_t t,
                      AttentionExact& to) {
  const int64_t g = h / (n.heads / n.groups);
  const double gate = x.gate(0);
  std::vector<double> p(static_cast<size_t>(n.source)), dp(p.size()), dp_terms(p.size());
  double highest = -kInfinity, sum = 0, delta = 0, delta_terms = 0;
  auto on = [&](int64_t s) { return !x.masked || x.mask(b, s) != 0; };
  for (int64_t s = 0; s < n.source; ++s) {
    if (!on(s)) continue;
    double score = 0, terms = 0;
    for (int64_t c = 0; c < n.size; ++c) {
      const double term = x.query(b, h, t, c) * x.key(b, g, s, c) * x.scale;
      score += term, terms += std::fabs(term);
    }
    p[static_cast<size_t>(s)] = score;
    highest = std::max(highest, score), to.spread = std::max(to.spread, terms);
  }
  for (int64_t s = 0; s < n.source; ++s) {
    if (on(s)) sum += p[static_cast<size_t>(s)] = std::exp(p[static_cast<size_t>(s)] - highest);
  }
  const size_t row = static_cast<size_t>((b * n.heads + h) * n.length + t);
  to.lse.value[row] = sum == 0 ? -kInfinity : (highest + std::log(sum)) / std::log(2.0);
  to.lse.terms[row] = sum == 0 ? 0 : std::fabs(to.lse.value[row]) + 1;
  double dgate = 0, dgate_terms = 0;
  for (int64_t c = 0; c < n.size; ++c) {
    double attended = 0, terms = 0;
    for (int64_t s = 0; s < n.source; ++s) {
      if (!on(s)) continue;
      const double term = p[static_cast<size_t>(s)] / sum * x.value(b, g, s, c);
      attended += term, terms += std::fabs(term);
    }
    const double residual = x.with_residual ? x.residual(b, t, h, c) : 0, grad = x.grad(b, t, h, c);
    const size_t i = static_cast<size_t>(((b * n.length + t) * n.heads + h) * n.size + c);
    to.out.value[i] = residual + gate * attended, to.out.terms[i] = std::fabs(residual) + std::fabs(gate) * terms;
    dgate += grad * attended, dgate_terms += std::fabs(grad) * terms;
  }
  to.dgate.value[0] += dgate, to.dgate.terms[0] += dgate_terms;
  for (int64_t s = 0; s < n.source; ++s) {
    if (!on(s)) continue;
    const size_t i = static_cast<size_t>(s);
    p[i] /= sum;
    for (int64_t c = 0; c < n.size; ++c) {
      const double term = x.grad(b, t, h, c) * x.value(b, g, s, c);
      dp[i] += term, dp_terms[i] += std::fabs(term);
    }
    delta += p[i] * dp[i], delta_terms += p[i] * dp_terms[i];
  }
  for (int64_t s = 0; s < n.source; ++s) {
    if (!on(s)) continue;
    const size_t i = static_cast<size_t>(s);
    const double dscore = p[i] * (dp[i] - delta) * gate * x.scale;
    const double terms = std::fabs(p[i] * (dp_terms[i] + delta_terms) * gate * x.scale);
    for (int64_t c = 0; c < n.size; ++c) {
      const size_t of_query = row * static_cast<size_t>(n.size) + static_cast<size_t>(c);
      const size_t of_key = static_cast<size_t>(((b * n.groups + g) * n.source + s) * n.size + c);
      to.dquery.value[of_query] += dscore * x.key(b, g, s, c);
      to.dquery.terms[of_query] += terms * std::fabs(x.key(b, g, s, c));
      to.dkey.value[of_key] += dscore * x.query(b, h, t, c);
      to.dkey.terms[of_key] += terms * std::fabs(x.query(b, h, t, c));
      to.dvalue.value[of_key] += p[i] * gate * x.grad(b, t, h, c);
      to.dvalue.terms[of_key] += std::fabs(p[i] * gate * x.grad(b, t, h, c));
    }
  }
}

}  // namespace layalign::naive
