// Checks every CPU kernel against loops in double precision written from the formulas of layalign.h.
//
// A program of its own, without Python: to be run plain, under the address and undefined-behaviour sanitizers, and
// under an emulator of other machines. Every buffer has exactly its tensor's size, outputs are filled with NaN
// beforehand, and so is all memory under a false mask and between strided rows. Prints a line per group of checks for
// each instruction set of the machine: their number and the worst error as a fraction of what is allowed. Exit status 1
// on a failure.
//
// usage: cpu_check [cases per group, default 60]
#include "naive.h"

using namespace layalign;
using namespace layalign::naive;

namespace {

struct Group {
  int64_t checks = 0;
  double worst = 0;
};
std::map<std::string, Group> results;
bool failed = false;

void fail(const std::string& group, const std::string& what) {
  if (!failed) std::printf("FAILED (%s) %s: %s\n", cpu::instruction_set(), group.c_str(), what.c_str());
  failed = true;
}

// |found - exact| against half a unit of the type (twice over) and `units` float roundings of the largest sum of terms.
void compare(const std::string& group, const std::string& what, const Array& found, const Exact& exact, double units) {
  double largest = 0, terms = 0, worst = 0;
  for (double v : exact.value) largest = std::max(largest, std::isfinite(v) ? std::fabs(v) : 0);
  for (double v : exact.terms) terms = std::max(terms, v);
  const double smallest = found.dtype == DType::float16 ? 0x1p-24 : 1e-37;
  const double allowed = eps_of(found.dtype) * largest + units * kFloatEps * terms + smallest;
  size_t n = 0;
  found.each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const double want = exact.value[n++], got = found(i, j, k, l);
    double error = std::fabs(want - got);
    if (std::isinf(want) && got == want) error = 0;
    if (!(error <= allowed)) {
      fail(group, what + " at " + std::to_string(n - 1) + ": " + std::to_string(got) + " for " + std::to_string(want));
    }
    worst = std::max(worst, error / allowed);
  });
  Group& entry = results[group];
  ++entry.checks;
  entry.worst = std::max(entry.worst, worst);
}

void same_bits(const std::string& group, const std::string& what, const Array& a, const Array& b) {
  a.each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t size = bytes_of(a.dtype), at = a.offset(i, j, k, l) * size;
    const char *one = static_cast<const char*>(a.data) + at, *two = static_cast<const char*>(b.data) + at;
    if (std::memcmp(one, two, static_cast<size_t>(size)) == 0) return;
    fail(group, what + ": other bits with another number of threads");
  });
  ++results[group].checks;
}

// -- layer mix --------------------------------------------------------------------------------------------------------

void check_mix(const MixCase& n) {
  const std::string group = std::string("layer_mix ") + name_of(n.type);
  const std::string back = std::string("layer_mix backward ") + name_of(n.type);
  const bool strided = below(2) != 0, biased = below(3) != 0;
  std::vector<Array> hidden;
  for (int64_t e = 0; e < n.layers; ++e) {
    const int64_t gap = strided ? below(3) : 0;
    const std::vector<int> order = strided && below(2) != 0 ? std::vector<int>{1, 0, 2} : std::vector<int>{0, 1, 2};
    hidden.push_back(Array(n.type, {n.batch, n.length, n.width}, order, gap).fill());
  }
  std::vector<Tensor> pointers(hidden.begin(), hidden.end());
  Array weight = Array(one_of({DType::float32, n.type}), {n.slots, n.layers}, {}, below(3)).fill(0.4);
  Array bias = Array(one_of({DType::float32, n.type}), {n.slots}).fill();
  Array out(n.type, {n.slots, n.batch, n.length, n.width});
  LayerMixForward call{pointers.data(), static_cast<int>(n.layers), weight, biased ? bias : Tensor{}, out};
  cpu::layer_mix_forward(call, 1);

  Exact exact(out.elements);
  size_t at = 0;
  out.each([&](int64_t j, int64_t b, int64_t s, int64_t d) {
    double total = biased ? bias(j) : 0, terms = std::fabs(total);
    for (int64_t e = 0; e < n.layers; ++e) {
      const double term = weight(j, e) * hidden[static_cast<size_t>(e)](b, s, d);
      total += term, terms += std::fabs(term);
    }
    exact.value[at] = std::max(total, 0.0), exact.terms[at++] = terms;
  });
  compare(group, n.text(), out, exact, 2);

  const std::vector<int> grad_order = strided ? std::vector<int>{1, 0, 2, 3} : std::vector<int>{0, 1, 2, 3};
  Array grad = Array(n.type, {n.slots, n.batch, n.length, n.width}, grad_order, strided ? below(3) : 0).fill();
  const int wanted = static_cast<int>(1 + below(3));  // 1: weight and bias, 2: hidden, 3: all
  Array dweight(DType::float32, {n.slots, n.layers}), dbias(DType::float32, {n.slots});
  Array dhidden(n.type, {n.layers, n.batch, n.length, n.width});
  LayerMixBackward backward{pointers.data(), static_cast<int>(n.layers), weight, grad, out, {}, {}, {}, {}};
  if (wanted & 1) backward.dweight = dweight, backward.dbias = dbias;
  if (wanted & 2) backward.dhidden = dhidden;
  cpu::layer_mix_backward(backward, 1);
  auto masked = [&](int64_t j, int64_t b, int64_t s, int64_t d) { return out(j, b, s, d) > 0 ? grad(j, b, s, d) : 0; };
  if (wanted & 1) {
    Exact weights(dweight.elements), biases(n.slots);
    out.each([&](int64_t j, int64_t b, int64_t s, int64_t d) {
      const double g = masked(j, b, s, d);
      biases.value[static_cast<size_t>(j)] += g, biases.terms[static_cast<size_t>(j)] += std::fabs(g);
      for (int64_t e = 0; e < n.layers; ++e) {
        const double term = g * hidden[static_cast<size_t>(e)](b, s, d);
        weights.value[static_cast<size_t>(j * n.layers + e)] += term;
        weights.terms[static_cast<size_t>(j * n.layers + e)] += std::fabs(term);
      }
    });
    compare(back, n.text() + " dweight", dweight, weights, 2);
    compare(back, n.text() + " dbias", dbias, biases, 2);
  }
  if (wanted & 2) {
    Exact states(dhidden.elements);
    at = 0;
    dhidden.each([&](int64_t e, int64_t b, int64_t s, int64_t d) {
      for (int64_t j = 0; j < n.slots; ++j) {
        const double term = weight(j, e) * masked(j, b, s, d);
        states.value[at] += term, states.terms[at] += std::fabs(term);
      }
      ++at;
    });
    compare(back, n.text() + " dhidden", dhidden, states, 2);
  }

  for (int threads : {2, 3}) {
    LayerMixForward again = call;
    LayerMixBackward back_again = backward;
    Array out2 = out.fresh(), dweight2 = dweight.fresh(), dbias2 = dbias.fresh(), dhidden2 = dhidden.fresh();
    again.out = out2;
    if (wanted & 1) back_again.dweight = dweight2, back_again.dbias = dbias2;
    if (wanted & 2) back_again.dhidden = dhidden2;
    cpu::layer_mix_forward(again, threads);
    cpu::layer_mix_backward(back_again, threads);
    same_bits(group, n.text(), out, out2);
    if (wanted & 1) same_bits(back, n.text(), dweight, dweight2), same_bits(back, n.text(), dbias, dbias2);
    if (wanted & 2) same_bits(back, n.text(), dhidden, dhidden2);
  }
}

// -- layer projection -------------------------------------------------------------------------------------------------

bool sometimes(int64_t one_in) { return below(one_in) == 0; }

// The result is NaN, infinite or finite where the sum in double precision is.
void same_nan(const std::string& group, const std::string& what, const Array& found, const Exact& exact) {
  size_t n = 0;
  found.each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const double want = exact.value[n++], got = found(i, j, k, l);
    const bool same = std::isnan(want) ? std::isnan(got) : std::isinf(want) ? got == want : std::isfinite(got);
    if (!same) fail(group, what + ": " + std::to_string(got) + " for " + std::to_string(want));
  });
  ++results[group].checks;
}

// The weights (J, N, K) as the kernels read them.
Array packed(const Array& weight, int threads, bool* finite) {
  const int64_t width = cpu::packed_width();
  Array to(DType::float32, {weight.size[0], (weight.size[1] + width - 1) / width, weight.size[2], width});
  *finite = cpu::pack_weight({weight, to}, threads);
  return to;
}

void check_projection(const MixCase& n, int64_t columns) {
  const std::string group = "layer_projection", what = n.text() + " N" + std::to_string(columns);
  const bool shared = below(2) != 0, infinite = sometimes(6);
  std::vector<Array> hidden, outs;
  for (int64_t e = 0; e < n.layers; ++e) {
    const std::vector<int> order = below(2) != 0 ? std::vector<int>{1, 0, 2} : std::vector<int>{0, 1, 2};
    hidden.push_back(Array(DType::float32, {n.batch, n.length, n.width}, order, below(3)).fill());
  }
  const std::vector<Tensor> layers(hidden.begin(), hidden.end());
  Array mix = Array(DType::float32, {n.slots, n.layers}, {}, below(3)).fill(0.4), mix_bias(DType::float32, {n.slots});
  mix_bias.fill(one_of({0.0, 0.5, 4.0}));  // about half of x is zero, or less, or nothing
  Array weight = Array(DType::float32, {shared ? 1 : n.slots, columns, n.width}, {0, 1, 2}, below(3)).fill();
  Array bias = Array(DType::float32, {n.slots, columns}, {}, below(3)).fill();
  const bool mix_biased = below(3) != 0, biased = below(3) != 0;
  if (infinite && weight.elements > 0) {
    const double value = one_of({kNan, kInfinity, -kInfinity});
    write(weight.data, DType::float32, weight.offset(below(weight.size[0]), below(columns), below(n.width)), value);
  }
  bool finite = false;
  const Array whole = packed(weight, 1, &finite);
  if (finite == (infinite && weight.elements > 0)) fail(group, what + ": an infinity in the weight was not seen");
  for (int64_t j = 0; j < n.slots; ++j) outs.push_back(Array(DType::float32, {n.batch, n.length, columns}));
  for (int threads : {1, 2, 3}) {
    std::vector<Array> found;
    for (const Array& out : outs) found.push_back(out.fresh());
    const std::vector<Tensor> to(found.begin(), found.end());
    const LayerProjectionForward call{layers.data(), static_cast<int>(n.layers), mix, mix_biased ? mix_bias : Tensor{},
                                      whole, biased ? bias : Tensor{}, to.data(), finite};
    cpu::layer_projection_forward(call, threads);
    for (size_t j = 0; threads > 1 && j < outs.size(); ++j) same_bits(group, what, outs[j], found[j]);
    outs = found;
  }
  std::vector<double> x(static_cast<size_t>(n.width)), sizes(x.size());
  for (int64_t j = 0; j < n.slots; ++j) {
    Exact exact(n.batch * n.length * columns);
    size_t at = 0;
    for (int64_t row = 0; row < n.batch * n.length; ++row) {
      for (int64_t k = 0; k < n.width; ++k) {
        double total = mix_biased ? mix_bias(j) : 0, terms = std::fabs(total);
        for (int64_t e = 0; e < n.layers; ++e) {
          const double term = mix(j, e) * hidden[static_cast<size_t>(e)](row / n.length, row % n.length, k);
          total += term, terms += std::fabs(term);
        }
        x[static_cast<size_t>(k)] = std::max(total, 0.0);
        sizes[static_cast<size_t>(k)] = total > -1e-5 * terms ? terms : 0;
      }
      for (int64_t c = 0; c < columns; ++c, ++at) {
        exact.value[at] = biased ? bias(j, c) : 0, exact.terms[at] = std::fabs(exact.value[at]);
        for (int64_t k = 0; k < n.width; ++k) {
          const double w = weight(shared ? 0 : j, c, k);
          exact.value[at] += x[static_cast<size_t>(k)] * w;
          exact.terms[at] += sizes[static_cast<size_t>(k)] * std::fabs(w);
        }
      }
    }
    if (infinite) same_nan(group, what, outs[static_cast<size_t>(j)], exact);
    else compare(group, what, outs[static_cast<size_t>(j)], exact, 4);
  }
}

void check_projection_backward(int64_t slots, int64_t rows, int64_t width, int64_t columns) {
  const std::string group = "layer_projection backward", what = "J" + std::to_string(slots) + " R" + std::to_string(rows) +
                            " K" + std::to_string(width) + " N" + std::to_string(columns);
  const bool shared = below(2) != 0, infinite = sometimes(6);
  Array x = Array(DType::float32, {slots, rows, width}).fill();
  const double above = one_of({0.0, 0.0, 1.0, -5.0});  // half of x is zero, most of it, or nothing
  x.each([&](int64_t j, int64_t r, int64_t k, int64_t) {
    write(x.data, DType::float32, x.offset(j, r, k), x(j, r, k) > above ? x(j, r, k) : 0);
  });
  std::vector<Array> grads;
  std::vector<Tensor> given;
  for (int64_t j = 0; j < slots; ++j) {
    grads.push_back(Array(DType::float32, {rows, columns}, {0, 1}, below(3)).fill());
    given.push_back(sometimes(5) ? Tensor{} : grads.back());
  }
  if (infinite && grads[0].elements > 0) {
    write(grads[0].data, DType::float32, grads[0].offset(below(rows), below(columns)), one_of({kNan, kInfinity}));
  }
  const Array before = Array(DType::float32, {shared ? 1 : slots, width, columns}).fill();
  Array first;
  for (int threads : {1, 2, 3}) {
    Array found = before.fresh();
    std::memcpy(found.data, before.data, static_cast<size_t>(before.elements) * 4);
    cpu::layer_projection_backward({x, given.data(), found}, threads);
    if (threads > 1) same_bits(group, what, first, found);
    first = found;
  }
  Exact exact(before.elements);
  size_t at = 0;
  first.each([&](int64_t group_, int64_t k, int64_t c, int64_t) {
    exact.value[at] = before(group_, k, c), exact.terms[at] = std::fabs(exact.value[at]);
    for (int64_t j = shared ? 0 : group_; j < (shared ? slots : group_ + 1); ++j) {
      for (int64_t r = 0; given[static_cast<size_t>(j)] && r < rows; ++r) {
        const double term = x(j, r, k) * grads[static_cast<size_t>(j)](r, c);
        exact.value[at] += term, exact.terms[at] += std::fabs(term);
      }
    }
    ++at;
  });
  if (infinite) same_nan(group, what, first, exact);
  else compare(group, what, first, exact, 4);
}

// -- batched linear ---------------------------------------------------------------------------------------------------

void check_batched_linear(int64_t slots, int64_t rows, int64_t depth, int64_t columns) {
  const bool transposed = below(2) != 0, infinite = sometimes(6);
  const std::string group = "batched_linear", what = "J" + std::to_string(slots) + " R" + std::to_string(rows) + " K" +
                            std::to_string(depth) + " N" + std::to_string(columns) + (transposed ? " transposed" : "");
  std::vector<Array> x, weight, bias, out;
  std::vector<Tensor> biases;
  for (int64_t j = 0; j < slots; ++j) {
    x.push_back(Array(DType::float32, {rows, depth}, {}, below(3)).fill());
    const int64_t size[] = {transposed ? columns : depth, transposed ? depth : columns};
    weight.push_back(Array(DType::float32, {size[0], size[1]}, {}, below(3)).fill());
    bias.push_back(Array(DType::float32, {columns}).fill());
    biases.push_back(sometimes(3) ? Tensor{} : bias.back());
    out.push_back(Array(DType::float32, {rows, columns}, {}, below(3)));
  }
  if (infinite && weight[0].elements > 0) {
    const int64_t i = below(weight[0].size[0]), k = below(weight[0].size[1]);
    write(weight[0].data, DType::float32, weight[0].offset(i, k), one_of({kNan, kInfinity}));
  }
  const std::vector<Tensor> xs(x.begin(), x.end()), weights(weight.begin(), weight.end());
  for (int threads : {1, 2, 3}) {
    std::vector<Array> found;
    for (const Array& each : out) found.push_back(each.fresh());
    const std::vector<Tensor> to(found.begin(), found.end());
    cpu::batched_linear({static_cast<int>(slots), xs.data(), weights.data(), biases.data(), to.data(), transposed},
                        threads);
    for (size_t j = 0; threads > 1 && j < out.size(); ++j) same_bits(group, what, out[j], found[j]);
    out = found;
  }
  for (size_t j = 0; j < out.size(); ++j) {
    Exact exact(rows * columns);
    size_t at = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c, ++at) {
        exact.value[at] = biases[j] ? bias[j](c) : 0, exact.terms[at] = std::fabs(exact.value[at]);
        for (int64_t k = 0; k < depth; ++k) {
          const double term = x[j](r, k) * (transposed ? weight[j](c, k) : weight[j](k, c));
          exact.value[at] += term, exact.terms[at] += std::fabs(term);
        }
      }
    }
    if (infinite && j == 0) same_nan(group, what, out[j], exact);
    else compare(group, what, out[j], exact, 4);
  }
}

// -- attention --------------------------------------------------------------------------------------------------------

AttentionData attention_data(const AttentionCase& n) {
  AttentionData x;
  const std::vector<int> by_token{0, 2, 1, 3}, by_head{0, 1, 2, 3};
  auto order = [&] { return below(2) != 0 ? by_token : by_head; };
  x.query = Array(n.type, {n.batch, n.heads, n.length, n.size}, order(), below(2) * 3).fill();
  x.key = Array(n.type, {n.batch, n.groups, n.source, n.size}, order(), below(2) * 3).fill();
  x.value = Array(n.type, {n.batch, n.groups, n.source, n.size}, order(), below(2) * 3).fill();
  x.grad = Array(n.type, {n.batch, n.length, n.heads, n.size}, order(), below(2) * 3).fill();
  x.gate = Array(one_of({DType::float32, n.type}), {1}).fill();
  if (below(5) == 0) write(x.gate.data, x.gate.dtype, 0, 0);
  x.with_residual = below(2) != 0, x.masked = below(3) != 0;
  if (x.with_residual)
    x.residual = Array(one_of({DType::float32, n.type}), {n.batch, n.length, n.heads, n.size}, order()).fill();
  const double scale = (below(4) == 0 ? -1.5 : 1) / std::sqrt(static_cast<double>(n.size));
  x.scale = static_cast<double>(static_cast<float>(scale));
  if (!x.masked) return x;
  const std::vector<int> mask_order = below(2) != 0 ? std::vector<int>{1, 0} : std::vector<int>{0, 1};
  x.mask = Array(DType::boolean, {n.batch, n.source}, mask_order, below(2));
  const int64_t kind = below(4);  // scattered, right padding, left padding, nothing in row 0
  for (int64_t b = 0; b < n.batch; ++b) {
    const int64_t edge = below(n.source + 1);
    for (int64_t s = 0; s < n.source; ++s) {
      bool on = kind == 0 ? below(2) != 0 : kind == 1 ? s < edge : s >= edge;
      if (kind == 3 && b == 0) on = false;
      write(x.mask.data, DType::boolean, x.mask.offset(b, s), on);
      for (int64_t g = 0; g < n.groups && !on; ++g) {
        for (int64_t c = 0; c < n.size; ++c) {
          write(x.key.data, n.type, x.key.offset(b, g, s, c), below(2) != 0 ? kNan : kInfinity);
          write(x.value.data, n.type, x.value.offset(b, g, s, c), below(2) != 0 ? kNan : -kInfinity);
        }
      }
    }
  }
  return x;
}

void check_backward(
    const AttentionCase& n, const AttentionData& x, const AttentionExact& exact, const AttentionForward& forward) {
  const std::string group = std::string("attention backward ") + name_of(n.type);
  const std::vector<int> order = below(2) != 0 ? std::vector<int>{0, 2, 1, 3} : std::vector<int>{0, 1, 2, 3};
  Array dquery(n.type, {n.batch, n.heads, n.length, n.size}, order);
  Array dkey(n.type, {n.batch, n.groups, n.source, n.size}, order, below(2)), dvalue = dkey.fresh();
  Array dgate(DType::float32, {1});
  const int64_t wanted = below(3) == 0 ? 1 + below(15) : 15;
  AttentionBackward call{forward.in, x.grad, forward.lse, {}, {}, {}, {}, {}};
  Array first[4];
  for (int threads : {1, 2, 3}) {
    Array found[4] = {dquery.fresh(), dkey.fresh(), dvalue.fresh(), dgate.fresh()};
    Tensor* to[4] = {&call.dquery, &call.dkey, &call.dvalue, &call.dgate};
    for (int i = 0; i < 4; ++i) *to[i] = wanted >> i & 1 ? static_cast<Tensor>(found[i]) : Tensor{};
    cpu::gated_cross_attention_backward(call, threads);
    const Exact* want[4] = {&exact.dquery, &exact.dkey, &exact.dvalue, &exact.dgate};
    const char* names[4] = {" dquery", " dkey", " dvalue", " dgate"};
    for (int i = 0; i < 4; ++i) {
      if (!(wanted >> i & 1)) continue;
      if (threads > 1) same_bits(group, n.text() + names[i], first[i], found[i]);
      else compare(group, n.text() + names[i], first[i] = found[i], *want[i], 4 + 2 * exact.spread);
    }
  }
}

void check_attention(const AttentionCase& n) {
  const AttentionData x = attention_data(n);
  AttentionExact exact(n);
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t h = 0; h < n.heads; ++h)
      for (int64_t t = 0; t < n.length; ++t) exact_row(n, x, b, h, t, exact);

  const std::string group = std::string("attention ") + name_of(n.type);
  const Attention in{x.query, x.key, x.value, x.gate, x.residual, x.mask, static_cast<float>(x.scale)};
  Array out(n.type, {n.batch, n.length, n.heads, n.size}), lse(DType::float32, {n.batch, n.heads, n.length});
  AttentionForward call{in, out, lse};
  cpu::gated_cross_attention_forward(call, 1);
  compare(group, n.text(), out, exact.out, 4 + 2 * exact.spread);
  compare(group, n.text() + " lse", lse, exact.lse, 4 + 2 * exact.spread);
  for (int threads : {2, 3}) {
    Array out2 = out.fresh(), lse2 = lse.fresh();
    AttentionForward again{in, out2, lse2};
    cpu::gated_cross_attention_forward(again, threads);
    same_bits(group, n.text(), out, out2);
    same_bits(group, n.text() + " lse", lse, lse2);
  }
  check_backward(n, x, exact, call);
  if (n.length > 16) return;
  const std::string decode = std::string("attention decode ") + name_of(n.type);
  Array first;
  for (int threads : {1, 2, 3}) {
    Array found = out.fresh();
    AttentionDecode step{in, found, 1, {}};
    cpu::gated_cross_attention_decode(step, threads);
    if (threads == 1) compare(decode, n.text(), found, exact.out, 4 + 2 * exact.spread), first = found;
    else same_bits(decode, n.text(), first, found);
  }
}

// -- what is checked --------------------------------------------------------------------------------------------------

void check_projections(int cases) {
  check_projection({2, 37, 100, 8, 24, DType::float32}, 130);
  check_projection({1, 150, 512, 8, 4, DType::float32}, 64);  // more rows and slots than a task takes
  check_projection({2, 0, 16, 2, 4, DType::float32}, 5);
  check_projection({1, 3, 16, 2, 4, DType::float32}, 0);
  check_projection({1, 2, 3000, 2, 3, DType::float32}, 7);  // x of one slot is more than a task mixes at a time
  check_projection_backward(3, 200, 300, 70);
  check_projection_backward(2, 30, 40, 1100);  // more tiles than a task sums up
  check_projection_backward(2, 0, 8, 8);
  check_projection_backward(2, 8, 8, 0);
  check_batched_linear(2, 600, 40, 70);  // more rows than a task takes
  check_batched_linear(2, 9, 500, 30);   // deeper than a tile
  check_batched_linear(2, 3, 0, 5);
  check_batched_linear(2, 0, 3, 5);
  check_batched_linear(2, 3, 5, 0);
  for (int i = 0; i < cases; ++i) {
    const int64_t layers = one_of<int64_t>({1, 2, 7, 8, 13}), slots = one_of<int64_t>({1, 2, 6, 7});
    const int64_t width = one_of<int64_t>({1, 7, 16, 47, 48, 49, 64, 97, 130});
    const int64_t columns = one_of<int64_t>({1, 3, 15, 16, 17, 33, 50, 64, 70, 100, 128, 129, 200});
    check_projection({1 + below(3), 1 + below(40), width, layers, slots, DType::float32}, columns);
    check_projection_backward(slots, 1 + below(210), width, columns);
    check_batched_linear(slots, 1 + below(40), one_of<int64_t>({1, 15, 64, 191, 192, 193, 400}), columns);
  }
}

void check_all(int cases) {
  check_projections(cases);
  for (DType type : {DType::float32, DType::bfloat16, DType::float16}) {
    const MixCase mixes[] = {{1, 1, 1, 1, 2, type},   {2, 3, 7, 3, 6, type},  {1, 5, 2048, 24, 64, type},
                             {2, 9, 512, 8, 24, type}, {1, 2, 17, 64, 256, type}, {0, 3, 16, 2, 4, type},
                             {2, 0, 16, 2, 4, type},  {1, 3, 0, 2, 4, type},  {1, 37, 1024, 2, 30, type}};
    for (const MixCase& n : mixes) check_mix(n);
    for (int i = 0; i < cases; ++i) {
      const int64_t layers = one_of<int64_t>({1, 2, 3, 7, 8, 13, 24, 64});
      const int64_t slots = one_of<int64_t>({2, 6, 14, 24, 33, 64, 256});
      const int64_t width = one_of<int64_t>({1, 3, 7, 16, 17, 63, 97, 256, 259});
      check_mix({1 + below(3), 1 + below(9), width, layers, slots, type});
    }
    const AttentionCase attentions[] = {{1, 1, 1, 1, 1, 1, type},    {2, 4, 2, 3, 0, 16, type},
                                        {2, 4, 2, 0, 5, 16, type},   {0, 4, 2, 3, 5, 16, type},
                                        {1, 2, 1, 5, 1100, 64, type}, {1, 2, 2, 70, 600, 80, type},
                                        {1, 8, 2, 150, 130, 64, type}, {1, 12, 12, 1, 64, 64, type},
                                        {1, 2, 1, 40, 5000, 9, type}};
    for (const AttentionCase& n : attentions) check_attention(n);
    for (int i = 0; i < cases; ++i) {
      const int64_t groups = 1 + below(3), shared = one_of<int64_t>({1, 1, 2, 3, 4, 7});
      const int64_t length = one_of<int64_t>({1, 1, 2, 3, 4, 7, 16, 17, 63, 97});
      const int64_t source = one_of<int64_t>({1, 3, 7, 16, 17, 63, 97});
      check_attention({1 + below(2), groups * shared, groups, length, source,
                       one_of<int64_t>({1, 3, 7, 16, 17, 32, 59, 64, 80, 97, 128, 256}), type});
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 60;
  if (cpu::use_instruction_set("nothing of the kind")) fail("dispatch", "took an unknown name");
  for (const char* name : {"avx512", "avx2", "neon", "baseline"}) {
    if (!cpu::use_instruction_set(name)) continue;
    if (std::string(cpu::instruction_set()) != name) fail("dispatch", std::string("chose another set than ") + name);
    results.clear();
    generator.seed(1);
    check_all(cases);
    for (const auto& entry : results) {
      std::printf("%-9s %-26s %6lld checks, worst error %.2f of what is allowed\n", name, entry.first.c_str(),
                  static_cast<long long>(entry.second.checks), entry.second.worst);
    }
  }
  std::printf(failed ? "FAILED\n" : "all passed\n");
  return failed ? 1 : 0;
}
