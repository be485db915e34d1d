// Checks every CUDA kernel, run on the software device of csrc/cuda/emulate.h, against the loops of naive.h.
//
// Built with LAYALIGN_EMULATE_CUDA from this file, csrc/cuda/*.cu (as C++) and emulate.cpp; no CUDA toolkit. To be run
// plain and under the address and undefined-behaviour sanitizers. Outputs, workspaces, all memory under a false mask
// and between strided rows are NaN beforehand; every call is repeated with the threads in other orders and must give
// the same bits. Built with LAYALIGN_WATCH_SHARED (see emulate.h) it looks for races and bank conflicts instead, in one
// order. Prints a line per group: its checks and the worst error as a fraction of what is allowed. Exit status 1 on a
// failure.
//
// usage: cuda_check [cases per group and type, default 25] [seed, default 1] [only: "attention fp32", "layer_mix bf16"]
#include "../cuda/launch.cuh"
#include "naive.h"
#include "probes.h"

using namespace layalign;
using namespace layalign::naive;

namespace {

struct Group {
  int64_t checks = 0;
  double worst = 0;
};
std::map<std::string, Group> results;
bool failed = false;
const cuda::Launch kLaunch{0, nullptr};

void fail(const std::string& group, const std::string& what) {
  std::printf("FAILED %s: %s\n", group.c_str(), what.c_str());
  if (failed) std::exit(1);
  failed = true;
}

// What an error may come from.
struct Bound {
  double units = 4;     // float roundings of the sum of terms: of sums, scores and exponentials
  int operands = 0;     // times a factor of each term is rounded to the element type on the way (P, dS, weights)
  int64_t summands = 0;  // fp16 operands below 2^-14 lose 2^-25 each, whatever their size
};

void compare(const std::string& group, const std::string& what, const Array& found, const Exact& exact, DType type,
             const Bound& bound) {
  const double half_ulp = 0.51 * eps_of(found.dtype);
  const double relative = bound.units * kFloatEps + (type == DType::float32 ? 0 : bound.operands * 0.51 * eps_of(type));
  const double absolute = type == DType::float16 ? 0x1p-25 * (1 + 4 * static_cast<double>(bound.summands)) : 1e-37;
  double worst = 0;
  size_t n = 0;
  found.each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const double want = exact.value[n], got = found(i, j, k, l);
    const double allowed = half_ulp * std::fabs(want) + relative * exact.terms[n++] + absolute;
    double error = std::fabs(want - got);
    if (std::isinf(want) && got == want) error = 0;
    if (!(error <= allowed)) {
      fail(group, what + " at " + std::to_string(n - 1) + ": " + std::to_string(got) + ", exactly " +
                      std::to_string(want) + ", allowed " + std::to_string(allowed));
    }
    if (error > 0) worst = std::max(worst, error / allowed);
  });
  Group& entry = results[group];
  ++entry.checks;
  entry.worst = std::max(entry.worst, worst);
}

void same_bits(const std::string& group, const std::string& what, const Array& a, const Array& b) {
  a.each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
    const int64_t at = a.offset(i, j, k, l) * bytes_of(a.dtype);
    if (std::memcmp(static_cast<char*>(a.data) + at, static_cast<char*>(b.data) + at,
                    static_cast<size_t>(bytes_of(a.dtype)))) {
      fail(group, what + ": other bits when threads run in another order");
    }
  });
  ++results[group].checks;
}

// Calls once for the order of threads first come first served, once for the reverse and twice for a random one. A race
// that the device itself finds needs one order only.
template <typename Function>
void in_orders(const Function& function) {
  const uint64_t orders[] = {0, 1, 2 + static_cast<uint64_t>(below(1000)), 2};
  for (int i = 0; i < (cuda::emulation::kWatching ? 1 : 4); ++i) {
    cuda::emulation::set_order(orders[i]);
    function(i);
  }
  cuda::emulation::set_order(0);
}

Array workspace(int64_t elements) { return Array(DType::float32, {elements}); }
Tensor present(const Array& x) { return x.elements ? static_cast<Tensor>(x) : Tensor{}; }

// -- layer mix --------------------------------------------------------------------------------------------------------

struct MixData {
  std::vector<Array> hidden;
  std::vector<Tensor> pointers;
  Array weight, bias, out, grad;
  bool biased;
};

MixData mix_data(const MixCase& n) {
  MixData x;
  const int64_t kind = below(3);  // contiguous; strided but aligned; anything
  const int64_t round = (8 - n.width % 8) % 8;
  auto gap = [&] { return kind == 0 ? 0 : kind == 1 ? round + 8 * below(2) : below(4); };
  auto shift = [&] { return kind == 2 ? below(3) : 0; };
  for (int64_t e = 0; e < n.layers; ++e) {
    const std::vector<int> order = kind && below(2) ? std::vector<int>{1, 0, 2} : std::vector<int>{0, 1, 2};
    x.hidden.push_back(Array(n.type, {n.batch, n.length, n.width}, order, gap(), shift()).fill());
  }
  x.pointers.assign(x.hidden.begin(), x.hidden.end());
  x.weight = Array(one_of({DType::float32, n.type}), {n.slots, n.layers}, {}, below(3)).fill(0.4);
  x.bias = Array(one_of({DType::float32, n.type}), {n.slots}).fill();
  x.biased = below(3) != 0;
  x.out = Array(n.type, {n.slots, n.batch, n.length, n.width}, {}, 0, shift());
  const std::vector<int> order = kind ? std::vector<int>{1, 0, 2, 3} : std::vector<int>{0, 1, 2, 3};
  x.grad = Array(n.type, {n.slots, n.batch, n.length, n.width}, order, gap(), shift()).fill();
  return x;
}

void check_mix_backward(const MixCase& n, const MixData& x) {
  const std::string group = std::string("layer_mix backward ") + name_of(n.type);
  const int wanted = static_cast<int>(1 + below(3));  // 1: weight and bias, 2: hidden, 3: all
  Array dweight(DType::float32, {n.slots, n.layers}), dbias(DType::float32, {n.slots});
  Array dhidden(n.type, {n.layers, n.batch, n.length, n.width});
  in_orders([&](int run) {
    Array found[3] = {dweight.fresh(), dbias.fresh(), dhidden.fresh()};
    Array space = workspace(cuda::layer_mix_workspace(n.slots, n.layers, n.batch * n.length, n.width));
    LayerMixBackward call{x.pointers.data(), static_cast<int>(n.layers), x.weight, x.grad, x.out, {}, {}, {}, {}};
    if (wanted & 1) call.dweight = found[0], call.dbias = found[1], call.workspace = present(space);
    if (wanted & 2) call.dhidden = found[2];
    cuda::layer_mix_backward(call, kLaunch);
    if (run == 0) dweight = found[0], dbias = found[1], dhidden = found[2];
    if (wanted & 1) same_bits(group, n.text(), dweight, found[0]), same_bits(group, n.text(), dbias, found[1]);
    if (wanted & 2) same_bits(group, n.text(), dhidden, found[2]);
  });
  auto masked = [&](int64_t j, int64_t b, int64_t s, int64_t d) {
    return x.out(j, b, s, d) > 0 ? x.grad(j, b, s, d) : 0;
  };
  if (wanted & 1) {
    Exact weights(dweight.elements), biases(n.slots);
    x.out.each([&](int64_t j, int64_t b, int64_t s, int64_t d) {
      const double g = masked(j, b, s, d);
      biases.value[static_cast<size_t>(j)] += g, biases.terms[static_cast<size_t>(j)] += std::fabs(g);
      for (int64_t e = 0; e < n.layers; ++e) {
        const double term = g * x.hidden[static_cast<size_t>(e)](b, s, d);
        weights.value[static_cast<size_t>(j * n.layers + e)] += term;
        weights.terms[static_cast<size_t>(j * n.layers + e)] += std::fabs(term);
      }
    });
    compare(group, n.text() + " dweight", dweight, weights, DType::float32, {4, 0, 0});
    compare(group, n.text() + " dbias", dbias, biases, DType::float32, {4, 0, 0});
  }
  if (wanted & 2) {
    Exact states(dhidden.elements);
    size_t at = 0;
    dhidden.each([&](int64_t e, int64_t b, int64_t s, int64_t d) {
      for (int64_t j = 0; j < n.slots; ++j) {
        const double term = x.weight(j, e) * masked(j, b, s, d);
        states.value[at] += term, states.terms[at] += std::fabs(term);
      }
      ++at;
    });
    compare(group, n.text() + " dhidden", dhidden, states, n.type, {4, 1, n.slots});
  }
}

void check_mix(const MixCase& n) {
  const std::string group = std::string("layer_mix ") + name_of(n.type);
  MixData x = mix_data(n);
  in_orders([&](int run) {
    Array found = run ? x.out.fresh() : x.out;
    LayerMixForward call{x.pointers.data(), static_cast<int>(n.layers), x.weight, x.biased ? x.bias : Tensor{}, found};
    cuda::layer_mix_forward(call, kLaunch);
    same_bits(group, n.text(), x.out, found);
  });
  Exact exact(x.out.elements);
  size_t at = 0;
  x.out.each([&](int64_t j, int64_t b, int64_t s, int64_t d) {
    double total = x.biased ? x.bias(j) : 0, terms = std::fabs(total);
    for (int64_t e = 0; e < n.layers; ++e) {
      const double term = x.weight(j, e) * x.hidden[static_cast<size_t>(e)](b, s, d);
      total += term, terms += std::fabs(term);
    }
    exact.value[at] = std::max(total, 0.0), exact.terms[at++] = terms;
  });
  compare(group, n.text(), x.out, exact, n.type, {4, 1, n.layers});  // operands: an fp32 weight is rounded
  check_mix_backward(n, x);
}

// NaN goes through the relu, and stops in its gradient.
void check_mix_nan(DType type) {
  const std::string group = std::string("layer_mix ") + name_of(type);
  Array hidden = Array(type, {1, 1, 70}).fill(), weight = Array(type, {2, 1}).fill(), out(type, {2, 1, 1, 70});
  write(hidden.data, type, 3, kNan);
  write(hidden.data, type, 65, kInfinity);
  const Tensor pointer = hidden;
  cuda::layer_mix_forward({&pointer, 1, weight, {}, out}, kLaunch);
  Array grad = Array(type, {2, 1, 1, 70}).fill(), dhidden(type, {1, 1, 1, 70});
  cuda::layer_mix_backward({&pointer, 1, weight, grad, out, {}, {}, dhidden, {}}, kLaunch);
  for (int64_t j = 0; j < 2; ++j) {
    const double large = out(j, 0, 0, 65);
    if (!std::isnan(out(j, 0, 0, 3)) || large != (weight(j, 0) > 0 ? kInfinity : 0)) fail(group, "NaN or infinity");
  }
  if (dhidden(0, 0, 0, 3) != 0 || std::isnan(dhidden(0, 0, 0, 65))) fail(group, "the gradient at a NaN");
  ++results[group].checks;
}

// -- attention --------------------------------------------------------------------------------------------------------

AttentionData attention_data(const AttentionCase& n, bool masked) {
  AttentionData x;
  const std::vector<int> by_token{0, 2, 1, 3}, by_head{0, 1, 2, 3};
  const int64_t kind = below(3);  // contiguous; strided but aligned; anything
  const int64_t round = (8 - n.size % 8) % 8;
  auto order = [&] { return kind && below(2) ? by_token : by_head; };
  auto gap = [&] { return kind == 0 ? 0 : kind == 1 ? round + 8 * below(2) : below(4); };
  auto shift = [&] { return kind == 2 ? below(3) : 0; };
  auto states = [&](int64_t heads, int64_t rows) {
    return Array(n.type, {n.batch, heads, rows, n.size}, order(), gap(), shift()).fill();
  };
  x.query = states(n.heads, n.length);
  x.key = states(n.groups, n.source);
  x.value = states(n.groups, n.source);
  x.grad = states(n.length, n.heads);
  x.gate = Array(one_of({DType::float32, DType::float16, DType::bfloat16}), {1}).fill();
  if (below(5) == 0) write(x.gate.data, x.gate.dtype, 0, 0);
  x.with_residual = below(2) != 0, x.masked = masked && below(3) != 0;
  const DType residual = one_of({DType::float32, DType::bfloat16, n.type});
  if (x.with_residual)
    x.residual = Array(residual, {n.batch, n.length, n.heads, n.size}, order(), gap(), shift()).fill();
  const double scale = (below(4) == 0 ? -1.5 : 1) / std::sqrt(static_cast<double>(n.size));
  x.scale = static_cast<double>(static_cast<float>(scale));
  if (!x.masked) return x;
  const std::vector<int> mask_order = below(2) ? std::vector<int>{1, 0} : std::vector<int>{0, 1};
  x.mask = Array(DType::boolean, {n.batch, n.source}, mask_order, below(2));
  const int64_t pattern = below(4);  // scattered, right padding, left padding, nothing in row 0
  for (int64_t b = 0; b < n.batch; ++b) {
    const int64_t edge = below(n.source + 1);
    for (int64_t s = 0; s < n.source; ++s) {
      bool on = pattern == 0 ? below(2) != 0 : pattern == 1 ? s < edge : s >= edge;
      if (pattern == 3 && b == 0) on = false;
      write(x.mask.data, DType::boolean, x.mask.offset(b, s), on);
      for (int64_t g = 0; g < n.groups && !on; ++g) {
        for (int64_t c = 0; c < n.size; ++c) {
          write(x.key.data, n.type, x.key.offset(b, g, s, c), below(2) ? kNan : kInfinity);
          write(x.value.data, n.type, x.value.offset(b, g, s, c), below(2) ? kNan : -kInfinity);
        }
      }
    }
  }
  return x;
}

void check_backward(const AttentionCase& n, const AttentionData& x, const AttentionExact& exact, const Attention& in,
                    const Array& lse, double units, int64_t wanted) {
  const std::string group = std::string("attention backward ") + name_of(n.type);
  const char* names[4] = {" dquery", " dkey", " dvalue", " dgate"};
  const std::vector<int> order = below(2) ? std::vector<int>{0, 2, 1, 3} : std::vector<int>{0, 1, 2, 3};
  const int64_t gap = below(2);
  if (!wanted) wanted = below(3) == 0 ? 1 + below(15) : 15;
  Array first[4] = {Array(n.type, {n.batch, n.heads, n.length, n.size}, order, gap),
                    Array(n.type, {n.batch, n.groups, n.source, n.size}, order, gap),
                    Array(n.type, {n.batch, n.groups, n.source, n.size}), Array(DType::float32, {1})};
  const Exact* want[4] = {&exact.dquery, &exact.dkey, &exact.dvalue, &exact.dgate};
  const int64_t rows = n.heads / n.groups * n.length, summands[4] = {n.source, rows, rows, 0};
  in_orders([&](int run) {
    Array found[4] = {first[0].fresh(), first[1].fresh(), first[2].fresh(), first[3].fresh()};
    AttentionBackward call{in, x.grad, lse, {}, {}, {}, {}, {}};
    Tensor* to[4] = {&call.dquery, &call.dkey, &call.dvalue, &call.dgate};
    for (int i = 0; i < 4; ++i) *to[i] = wanted >> i & 1 ? static_cast<Tensor>(found[i]) : Tensor{};
    Array space = workspace(cuda::gated_cross_attention_backward_workspace(call));
    call.workspace = present(space);
    cuda::gated_cross_attention_backward(call, kLaunch);
    for (int i = 0; i < 4; ++i) {
      if (!(wanted >> i & 1)) continue;
      if (run == 0) {
        first[i] = found[i];
        compare(group, n.text() + names[i], found[i], *want[i], n.type, {units, i < 3 ? 1 : 0, summands[i]});
      }
      same_bits(group, n.text() + names[i], first[i], found[i]);
    }
  });
}

void check_decode(const AttentionCase& n, const AttentionExact& exact, const Attention& in, double units) {
  const std::string group = std::string("attention decode ") + name_of(n.type);
  const int suggested = cuda::decode_splits(in, 0);
  if (suggested < 1 || suggested > 64) fail(group, "a strange number of parts");
  for (const int splits : {1, 2, 3, 5, suggested}) {
    if (splits > 1 && below(2)) continue;
    Array first(n.type, {n.batch, n.length, n.heads, n.size}, {}, 0, below(2));
    in_orders([&](int run) {
      Array found = run ? first.fresh() : first;
      AttentionDecode call{in, found, splits, {}};
      Array space = workspace(cuda::decode_workspace(call));
      call.workspace = present(space);
      cuda::gated_cross_attention_decode(call, kLaunch);
      if (run == 0) compare(group, n.text(), found, exact.out, n.type, {units, 1, n.source});
      same_bits(group, n.text(), first, found);
    });
  }
}

// `wanted`: gradients, a bit each of query, key, value and gate, and no mask; 0: drawn, as the mask is.
void check_attention(const AttentionCase& n, int64_t wanted = 0) {
  const std::string group = std::string("attention ") + name_of(n.type);
  const AttentionData x = attention_data(n, !wanted);
  AttentionExact exact(n);
  for (int64_t b = 0; b < n.batch; ++b)
    for (int64_t h = 0; h < n.heads; ++h)
      for (int64_t t = 0; t < n.length; ++t) exact_row(n, x, b, h, t, exact);

  const Attention in{x.query, x.key, x.value, x.gate, x.residual, x.mask, static_cast<float>(x.scale)};
  // A score's rounding is relative to `spread`, and enters twice: in the exponential and in the sum of them.
  const double units = 8 + 4 * exact.spread;
  Array out(n.type, {n.batch, n.length, n.heads, n.size}, {}, 0, below(2));
  Array lse(DType::float32, {n.batch, n.heads, n.length});
  in_orders([&](int run) {
    Array found = run ? out.fresh() : out, found_lse = run ? lse.fresh() : lse;
    cuda::gated_cross_attention_forward({in, found, found_lse}, kLaunch);
    if (run == 0) compare(group, n.text(), found, exact.out, n.type, {units, 1, n.source});
    if (run == 0) compare(group, n.text() + " lse", found_lse, exact.lse, DType::float32, {units, 0, 0});
    same_bits(group, n.text(), out, found);
    same_bits(group, n.text() + " lse", lse, found_lse);
  });
  check_backward(n, x, exact, in, lse, units, wanted);
  if (n.length <= 16) check_decode(n, exact, in, units);
}

// -- the software device itself ---------------------------------------------------------------------------------------

void check_device() {
  constexpr bool watching = cuda::emulation::kWatching;
  Array in = Array(DType::float32, {64}).fill(), out(DType::float32, {64});
  auto run = [&](int mode) -> std::string {
    try {
      cuda::probe({static_cast<float*>(out.data), static_cast<const float*>(in.data), mode});
    } catch (const Error& error) {
      return error.what();
    }
    for (int64_t i = 0; i < 64; ++i) {
      if (!(out(i) == in(63 - i))) return "wrong";
    }
    return "right";
  };
  auto expect = [&](int mode, const std::string& want, const std::string& what) {
    const std::string found = run(mode);
    if (found.find(want) == std::string::npos) fail("device", what + ": " + found);
    ++results["device"].checks;
  };
  const std::string race = watching ? "without a barrier between" : "wrong";
  in_orders([&](int) {
    expect(0, "right", "a correct kernel");
    expect(1, watching ? race : "probe (cuda): threads diverge", "divergence went unseen");
    expect(2, race, "a missing barrier went unseen");
    expect(3, race, "a missing wait went unseen");
    expect(4, "outside of shared memory", "an overrun went unseen");
    if (!watching) return;
    expect(5, race, "two lanes that write the same bytes");
    expect(6, race, "a write to what another lane read");
    expect(7, race, "a write that another lane reads");
    expect(8, "right", "lanes that meet at sync_warp");
  });
  cuda::emulation::take_traffic();
  if (!watching) return;
  // Turns and phases of each access by one warp: alone in its bank or in another's, 4, 8 and 16 bytes wide.
  const int64_t expected[][2] = {{1, 1}, {32, 1}, {2, 1}, {1, 1}, {2, 2}, {32, 2}, {4, 4}, {32, 4}, {4, 4}};
  for (int i = 0; i < 9; ++i) {
    run(100 + i);
    const std::vector<cuda::emulation::Traffic> found = cuda::emulation::take_traffic();
    if (found.size() != 1 || found[0].turns != expected[i][0] || found[0].phases != expected[i][1]) {
      fail("device", "bank conflicts of pattern " + std::to_string(i) + ": " + std::to_string(found[0].turns) +
                         " turns in " + std::to_string(found[0].phases) + " phases");
    }
    ++results["device"].checks;
  }
}

// Turns that the kernels may take for each phase of their accesses to shared memory. What the attention kernels need
// above 1 is in how results are staged once at the end, and, in fp32, probabilities for each tile; layer mix: nothing.
void check_traffic(DType type) {
  for (const cuda::emulation::Traffic& traffic : cuda::emulation::take_traffic()) {
    const std::string kernel = traffic.kernel.substr(0, traffic.kernel.find('<'));
    const bool attention = kernel == "rows_kernel" || kernel == "dquery_kernel" || kernel == "dsource_kernel";
    const double budget = !attention ? 1.0 : type == DType::float32 ? 1.2 : 1.6;
    const double turns = static_cast<double>(traffic.turns) / static_cast<double>(traffic.phases);
    std::printf("%s %-44s %10lld phases, %.3f turns each, allowed %.1f\n", name_of(type), traffic.kernel.c_str(),
                static_cast<long long>(traffic.phases), turns, budget);
    if (turns > budget) fail("shared memory", traffic.kernel + ": bank conflicts");
  }
}

// -- what is checked --------------------------------------------------------------------------------------------------

void check_layer_mix(DType type, int cases) {
  for (const MixCase& n : {MixCase{1, 1, 1, 1, 2, type}, MixCase{2, 3, 7, 3, 6, type}, MixCase{1, 3, 256, 24, 64, type},
                           MixCase{2, 9, 128, 8, 24, type}, MixCase{1, 2, 17, 64, 256, type},
                           MixCase{1, 2, 136, 64, 256, type}, MixCase{0, 3, 16, 2, 4, type},
                           MixCase{2, 0, 16, 2, 4, type}, MixCase{1, 3, 0, 2, 4, type},
                           MixCase{1, 260, 1024, 2, 18, type}}) {
    check_mix(n);
  }
  check_mix_nan(type);
  for (int i = 0; i < cases; ++i) {
    const int64_t layers = one_of<int64_t>({1, 2, 3, 7, 8, 13, 24, 33, 64});
    const int64_t slots = one_of<int64_t>({2, 6, 14, 24, 33, 64, 128});
    const int64_t width = one_of<int64_t>({1, 3, 7, 16, 17, 63, 97, 128, 259});
    check_mix({1 + below(3), 1 + below(9), width, layers, slots, type});
  }
}

void check_attention(DType type, int cases) {
  for (const AttentionCase& n : {AttentionCase{1, 1, 1, 1, 1, 1, type}, AttentionCase{2, 4, 2, 3, 0, 16, type},
                                 AttentionCase{2, 4, 2, 0, 5, 16, type}, AttentionCase{0, 4, 2, 3, 5, 16, type},
                                 AttentionCase{1, 2, 1, 5, 700, 64, type}, AttentionCase{1, 2, 2, 70, 300, 80, type},
                                 AttentionCase{1, 8, 2, 150, 130, 64, type}, AttentionCase{1, 12, 12, 1, 64, 64, type},
                                 AttentionCase{1, 8, 1, 200, 20, 128, type},
                                 AttentionCase{1, 2, 1, 100, 97, 256, type}}) {
    check_attention(n);
  }
  // Five tiles of the source (BlockShape::kBackSource), and no gradient of the gate: dquery's second pass begins at
  // once after the first, with the flags that the last tile had.
  for (const int64_t size : {64, 128, 256}) {
    const int64_t tile = type == DType::float32 ? (size == 256 ? 16 : 32) : (size == 64 ? 64 : 32);
    check_attention({1, 2, 1, 33, 5 * tile - 3, size, type}, 1);
  }
  for (int i = 0; i < cases; ++i) {
    const int64_t groups = 1 + below(3), shared = one_of<int64_t>({1, 1, 2, 3, 4, 7});
    const int64_t length = one_of<int64_t>({1, 1, 2, 3, 4, 7, 16, 17, 63, 97});
    const int64_t source = one_of<int64_t>({1, 3, 7, 16, 17, 63, 97, 200});
    check_attention({1 + below(2), groups * shared, groups, length, source,
                     one_of<int64_t>({1, 3, 7, 16, 17, 32, 59, 60, 64, 80, 97, 128, 256}), type});
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 25;
  generator.seed(count > 2 ? static_cast<uint64_t>(std::atoll(arguments[2])) : 1);
  const std::string only = count > 3 ? arguments[3] : "";
  try {
    check_device();
    for (DType type : {DType::float32, DType::bfloat16, DType::float16}) {
      const std::string name = name_of(type);
      if (only.empty() || only == "layer_mix " + name) check_layer_mix(type, cases);
      if (only.empty() || only == "attention " + name) check_attention(type, cases);
      check_traffic(type);
    }
  } catch (const std::exception& error) {
    fail("exception", error.what());
  }
  const int64_t conflicts = cuda::emulation::bank_conflicts();
  if (conflicts) fail("shared memory", std::to_string(conflicts) + " rows of ldmatrix wait for another in their banks");
  for (const auto& entry : results) {
    std::printf("%-26s %6lld checks, worst error %.2f of what is allowed\n", entry.first.c_str(),
                static_cast<long long>(entry.second.checks), entry.second.worst);
  }
  std::printf(failed ? "FAILED\n" : "all passed\n");
  return failed ? 1 : 0;
}
