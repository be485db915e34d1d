#include "checks.h"

#include <initializer_list>

namespace layalign {
namespace {

std::string sizes(const Tensor& tensor) {
  std::string text = "(";
  for (int i = 0; i < tensor.dims; ++i) text += (i ? ", " : "") + std::to_string(tensor.size[i]);
  return text + ")";
}

int64_t elements(const Tensor& tensor) {
  int64_t count = 1;
  for (int i = 0; i < tensor.dims; ++i) count *= tensor.size[i];
  return count;
}

bool floating(DType dtype) { return dtype != DType::boolean; }

// Checks of one call; every message begins with its name. A message is built only where a check fails: building a few
// takes as long as a small call.
struct Checker {
  const char* operation;

  void need(bool holds, const char* argument, const char* expected) const {
    if (!holds) fail(operation, argument, expected);
  }

  void shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> wanted) const {
    bool equal = tensor.dims == static_cast<int>(wanted.size());
    const int64_t* size = tensor.size;
    for (const int64_t each : wanted) equal = *size++ == each && equal;
    if (equal) return;
    std::string text;
    for (const int64_t each : wanted) text += (text.empty() ? "" : ", ") + std::to_string(each);
    fail(operation, name, "expected sizes (" + text + "), got " + sizes(tensor));
  }

  void unit_last_stride(const char* name, const Tensor& tensor) const {
    const int last = tensor.dims - 1;
    need(last < 0 || tensor.size[last] <= 1 || tensor.stride[last] == 1, name, "expected a last stride of 1");
  }

  void dtype(const char* name, const Tensor& tensor, DType wanted) const {
    if (tensor.dtype == wanted) return;
    const auto code = [](DType type) { return std::to_string(static_cast<int>(type)); };
    fail(operation, name, "expected dtype code " + code(wanted) + ", got " + code(tensor.dtype));
  }

  // For results, which are written as a whole.
  void contiguous(const char* name, const Tensor& tensor) const {
    if (elements(tensor) == 0) return;
    int64_t step = 1;
    for (int i = tensor.dims - 1; i >= 0; --i) {
      need(tensor.size[i] <= 1 || tensor.stride[i] == step, name, "expected contiguous memory");
      step *= tensor.size[i];
    }
  }

  void workspace(const Tensor& given, int64_t wanted) const {
    if (wanted == 0) return;
    dtype("workspace", given, DType::float32);
    contiguous("workspace", given);
    if (!given || elements(given) < wanted)
      fail(operation, "workspace", "expected " + std::to_string(wanted) + " elements");
  }
};

void check_layers(const Checker& checker, const Tensor* hidden, int layers, const Tensor& weight,
                  const char* weight_name = "weight") {
  if (layers < 1 || layers > kMaxLayers)
    fail(checker.operation, "hidden", "expected 1 to 64 layers, got " + std::to_string(layers));
  checker.need(hidden[0].dims == 3 && floating(hidden[0].dtype), "hidden[0]", "expected a floating tensor (B, S, D)");
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (int e = 0; e < kMaxLayers; ++e) all.push_back("hidden[" + std::to_string(e) + "]");
    return all;
  }();
  for (int e = 0; e < layers; ++e) {
    const char* name = names[static_cast<size_t>(e)].c_str();
    checker.shape(name, hidden[e], {hidden[0].size[0], hidden[0].size[1], hidden[0].size[2]});
    checker.dtype(name, hidden[e], hidden[0].dtype);
    checker.unit_last_stride(name, hidden[e]);
  }
  checker.need(weight.dims == 2 && floating(weight.dtype), weight_name, "expected a floating tensor (J, E)");
  checker.need(weight.size[0] >= 1 && weight.size[0] <= kMaxSlots, weight_name, "expected 1 to 256 slots");
  checker.shape(weight_name, weight, {weight.size[0], layers});
  checker.unit_last_stride(weight_name, weight);
}

// One number per slot, or absent.
void check_slots(const Checker& checker, const char* name, const Tensor& bias, int64_t slots) {
  if (!bias) return;
  checker.need(floating(bias.dtype), name, "expected a floating tensor");
  checker.shape(name, bias, {slots});
}

void check_inputs(const Checker& checker, const Attention& in) {
  const Tensor& query = in.query;
  checker.need(query.dims == 4 && floating(query.dtype), "query", "expected a floating tensor (B, H, T, d)");
  checker.need(query.size[3] >= 1 && query.size[3] <= kMaxHeadSize, "query", "expected a head size of 1 to 256");
  checker.need(in.key.dims == 4 && in.key.size[1] > 0 && query.size[1] % in.key.size[1] == 0, "key",
               "expected (B, G, S, d) with G a divisor of H");
  for (const auto& [name, states] : {std::pair{"key", &in.key}, std::pair{"value", &in.value}}) {
    checker.shape(name, *states, {query.size[0], in.key.size[1], in.key.size[2], query.size[3]});
    checker.dtype(name, *states, query.dtype);
    checker.unit_last_stride(name, *states);
  }
  checker.unit_last_stride("query", query);
  checker.need(in.gate && floating(in.gate.dtype) && elements(in.gate) == 1, "gate", "expected one floating number");
  if (in.residual) {
    checker.shape("residual", in.residual, {query.size[0], query.size[2], query.size[1], query.size[3]});
    checker.need(floating(in.residual.dtype), "residual", "expected a floating tensor");
    checker.unit_last_stride("residual", in.residual);
  }
  if (in.key_mask) {
    checker.shape("key_mask", in.key_mask, {query.size[0], in.key.size[2]});
    checker.dtype("key_mask", in.key_mask, DType::boolean);
  }
}

void check_out(const Checker& checker, const Attention& in, const Tensor& out) {
  checker.shape("out", out, {in.query.size[0], in.query.size[2], in.query.size[1], in.query.size[3]});
  checker.dtype("out", out, in.query.dtype);
  checker.contiguous("out", out);
}

void check_lse(const Checker& checker, const Attention& in, const Tensor& lse) {
  checker.shape("lse", lse, {in.query.size[0], in.query.size[1], in.query.size[2]});
  checker.dtype("lse", lse, DType::float32);
  checker.contiguous("lse", lse);
}

}  // namespace

void fail(const char* operation, const char* argument, const std::string& expected) {
  throw Error(std::string(operation) + ": " + argument + ": " + expected);
}

void check_tensor(const char* operation, const char* name, const Tensor& tensor) {
  for (int i = 0; i < tensor.dims; ++i)
    if (tensor.size[i] < 0 || tensor.stride[i] < 0) fail(operation, name, "expected sizes and strides of 0 or more");
  if (!tensor && elements(tensor) > 0) fail(operation, name, "expected an address, got null");
}

void check(const LayerMixForward& call) {
  const Checker checker{"layer_mix"};
  check_layers(checker, call.hidden, call.layers, call.weight);
  const Tensor& first = call.hidden[0];
  check_slots(checker, "bias", call.bias, call.weight.size[0]);
  checker.shape("out", call.out, {call.weight.size[0], first.size[0], first.size[1], first.size[2]});
  checker.dtype("out", call.out, first.dtype);
  checker.contiguous("out", call.out);
}

void check(const LayerMixBackward& call, int64_t workspace) {
  const Checker checker{"layer_mix_backward"};
  check_layers(checker, call.hidden, call.layers, call.weight);
  const Tensor& first = call.hidden[0];
  for (const auto& [name, states] : {std::pair{"grad", &call.grad}, std::pair{"x", &call.x}}) {
    checker.shape(name, *states, {call.weight.size[0], first.size[0], first.size[1], first.size[2]});
    checker.dtype(name, *states, first.dtype);
    checker.unit_last_stride(name, *states);
  }
  checker.contiguous("x", call.x);
  checker.need(bool(call.dweight) == bool(call.dbias), "dbias", "expected dweight and dbias together");
  if (call.dweight) {
    checker.shape("dweight", call.dweight, {call.weight.size[0], call.layers});
    checker.shape("dbias", call.dbias, {call.weight.size[0]});
    for (const Tensor* sums : {&call.dweight, &call.dbias}) {
      checker.dtype("dweight, dbias", *sums, DType::float32);
      checker.contiguous("dweight, dbias", *sums);
    }
  }
  if (call.dhidden) {
    checker.shape("dhidden", call.dhidden, {call.layers, first.size[0], first.size[1], first.size[2]});
    checker.dtype("dhidden", call.dhidden, first.dtype);
    checker.contiguous("dhidden", call.dhidden);
  }
  checker.workspace(call.workspace, workspace);
}

namespace {

// What pack_weight makes of a weight (slots, columns, depth).
void check_packed(const Checker& checker, const Tensor& packed, int64_t slots, int64_t columns, int64_t depth) {
  const int64_t width = cpu::packed_width();
  checker.shape("packed", packed, {slots, (columns + width - 1) / width, depth, width});
  checker.dtype("packed", packed, DType::float32);
  checker.contiguous("packed", packed);
}

}  // namespace

void check(const PackWeight& call, int threads) {
  const Checker checker{"pack_weight"};
  checker.need(threads >= 1, "threads", "expected at least one");
  checker.need(call.weight.dims == 3, "weight", "expected a tensor (J, N, K)");
  checker.dtype("weight", call.weight, DType::float32);
  checker.unit_last_stride("weight", call.weight);
  check_packed(checker, call.packed, call.weight.size[0], call.weight.size[1], call.weight.size[2]);
}

void check(const LayerProjectionForward& call, size_t outs, int threads) {
  const Checker checker{"layer_projection"};
  checker.need(threads >= 1, "threads", "expected at least one");
  check_layers(checker, call.hidden, call.layers, call.mix_weight, "mix_weight");
  const Tensor& first = call.hidden[0];
  const int64_t slots = call.mix_weight.size[0];
  checker.dtype("hidden[0]", first, DType::float32);
  checker.need(first.size[2] >= 1, "hidden[0]", "expected at least one column");
  check_slots(checker, "mix_bias", call.mix_bias, slots);
  checker.need(outs == static_cast<size_t>(slots) && call.out[0].dims == 3, "out",
               "expected a tensor (B, S, N) per slot");
  const int64_t columns = call.out[0].size[2];
  for (size_t j = 0; j < outs; ++j) {
    checker.shape("out", call.out[j], {first.size[0], first.size[1], columns});
    checker.dtype("out", call.out[j], DType::float32);
    checker.contiguous("out", call.out[j]);
  }
  const bool shared = call.packed.dims == 4 && call.packed.size[0] == 1;
  check_packed(checker, call.packed, shared ? 1 : slots, columns, first.size[2]);
  if (!call.bias) return;
  checker.shape("bias", call.bias, {slots, columns});
  checker.dtype("bias", call.bias, DType::float32);
  checker.unit_last_stride("bias", call.bias);
}

void check(const LayerProjectionBackward& call, size_t grads, int threads) {
  const Checker checker{"layer_projection_backward"};
  checker.need(threads >= 1, "threads", "expected at least one");
  const Tensor &x = call.x, &sums = call.dweight;
  checker.need(x.dims == 3 && x.size[0] >= 1 && x.size[2] >= 1, "x", "expected a tensor (J, R, K)");
  checker.dtype("x", x, DType::float32);
  checker.contiguous("x", x);
  checker.need(sums.dims == 3, "dweight", "expected a tensor (1 or J, K, N)");
  checker.shape("dweight", sums, {sums.size[0] == 1 ? 1 : x.size[0], x.size[2], sums.size[2]});
  checker.dtype("dweight", sums, DType::float32);
  checker.contiguous("dweight", sums);
  checker.need(grads == static_cast<size_t>(x.size[0]), "grad", "expected one per slot");
  for (size_t j = 0; j < grads; ++j) {
    if (!call.grad[j]) continue;
    checker.shape("grad", call.grad[j], {x.size[1], sums.size[2]});
    checker.dtype("grad", call.grad[j], DType::float32);
    checker.unit_last_stride("grad", call.grad[j]);
  }
}

void check(const BatchedLinear& call, int threads) {
  const Checker checker{"batched_linear"};
  checker.need(threads >= 1, "threads", "expected at least one");
  const Tensor& x = call.x[0];
  checker.need(x.dims == 2, "x", "expected tensors (R, K)");
  checker.need(call.out[0].dims == 2, "out", "expected tensors (R, N)");
  const int64_t rows = x.size[0], depth = x.size[1], columns = call.out[0].size[1];
  const auto whole = [&](const char* name, const Tensor& tensor) {
    checker.dtype(name, tensor, DType::float32);
    checker.unit_last_stride(name, tensor);
  };
  for (int j = 0; j < call.count; ++j) {
    checker.shape("x", call.x[j], {rows, depth});
    if (call.transposed) checker.shape("weight", call.weight[j], {columns, depth});
    else checker.shape("weight", call.weight[j], {depth, columns});
    checker.shape("out", call.out[j], {rows, columns});
    whole("x", call.x[j]), whole("weight", call.weight[j]), whole("out", call.out[j]);
    checker.need(rows <= 1 || columns == 0 || call.out[j].stride[0] >= columns, "out", "expected rows that do not overlap");
    if (!call.bias[j]) continue;
    checker.shape("bias", call.bias[j], {columns});
    whole("bias", call.bias[j]);
  }
}

void check(const AttentionForward& call) {
  const Checker checker{"gated_cross_attention"};
  check_inputs(checker, call.in);
  check_out(checker, call.in, call.out);
  check_lse(checker, call.in, call.lse);
}

void check(const AttentionDecode& call, int64_t workspace) {
  const Checker checker{"gated_cross_attention_decode"};
  check_inputs(checker, call.in);
  check_out(checker, call.in, call.out);
  checker.need(call.splits >= 1, "splits", "expected at least 1");
  checker.workspace(call.workspace, workspace);
}

void check(const AttentionBackward& call, int64_t workspace) {
  const Checker checker{"gated_cross_attention_backward"};
  check_inputs(checker, call.in);
  const Attention& in = call.in;
  checker.shape("grad", call.grad, {in.query.size[0], in.query.size[2], in.query.size[1], in.query.size[3]});
  checker.dtype("grad", call.grad, in.query.dtype);
  checker.unit_last_stride("grad", call.grad);
  check_lse(checker, in, call.lse);
  const Tensor *results[] = {&call.dquery, &call.dkey, &call.dvalue}, *inputs[] = {&in.query, &in.key, &in.value};
  const char* names[] = {"dquery", "dkey", "dvalue"};
  for (int i = 0; i < 3; ++i) {
    if (!*results[i]) continue;
    const int64_t* size = inputs[i]->size;
    checker.shape(names[i], *results[i], {size[0], size[1], size[2], size[3]});
    checker.dtype(names[i], *results[i], in.query.dtype);
    checker.unit_last_stride(names[i], *results[i]);
  }
  if (call.dgate) {
    checker.need(elements(call.dgate) == 1, "dgate", "expected one number");
    checker.dtype("dgate", call.dgate, DType::float32);
  }
  checker.workspace(call.workspace, workspace);
}

int64_t mix_workspace(const LayerMixBackward& call, [[maybe_unused]] int device) {
  if (!call.dweight || call.layers < 1) return 0;
  const Tensor& first = call.hidden[0];
  const int64_t rows = first.size[0] * first.size[1];
#ifdef LAYALIGN_HAVE_CUDA
  if (device >= 0) return cuda::layer_mix_workspace(call.weight.size[0], call.layers, rows, first.size[2]);
#endif
  return cpu::layer_mix_workspace(call.weight.size[0], call.layers, rows, first.size[2]);
}

int64_t decode_workspace([[maybe_unused]] const AttentionDecode& call, [[maybe_unused]] int device) {
#ifdef LAYALIGN_HAVE_CUDA
  if (device >= 0 && call.splits > 1) return cuda::decode_workspace(call);
#endif
  return 0;
}

int64_t backward_workspace([[maybe_unused]] const AttentionBackward& call, [[maybe_unused]] int device) {
#ifdef LAYALIGN_HAVE_CUDA
  if (device >= 0) return cuda::gated_cross_attention_backward_workspace(call);
#endif
  return 0;
}

}  // namespace layalign
