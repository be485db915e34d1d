// The Python module: takes tensors as (address, dtype, sizes, strides), checks them against one another and calls the
// kernels of the device. Nothing here knows torch; its caller is layalign/ops/extension.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"

namespace py = pybind11;

namespace layalign {
namespace {

// (address, dtype, sizes, strides) or None.
Tensor tensor(const char* operation, const char* name, py::handle given) {
  Tensor found;
  if (given.is_none()) return found;
  if (!PyTuple_Check(given.ptr()) || PyTuple_GET_SIZE(given.ptr()) != 4)
    fail(operation, name, "expected (address, dtype, sizes, strides) or None");
  auto parts = py::reinterpret_borrow<py::tuple>(given);
  auto sizes = parts[2].cast<py::tuple>(), strides = parts[3].cast<py::tuple>();
  if (sizes.size() > 4 || sizes.size() != strides.size()) fail(operation, name, "expected at most 4 sizes, as many strides");
  found.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
  const int dtype = parts[1].cast<int>();
  if (dtype < 0 || dtype > static_cast<int>(DType::boolean)) fail(operation, name, "unknown dtype code");
  found.dtype = static_cast<DType>(dtype);
  found.dims = static_cast<int>(sizes.size());
  for (int i = 0; i < found.dims; ++i) {
    found.size[i] = sizes[i].cast<int64_t>();
    found.stride[i] = strides[i].cast<int64_t>();
  }
  check_tensor(operation, name, found);
  return found;
}

std::vector<Tensor> tensors(const char* operation, const char* name, const py::sequence& given) {
  std::vector<Tensor> found;
  found.reserve(given.size());
  for (py::handle one : given) found.push_back(tensor(operation, name, one));
  return found;
}

// Where a call runs: device -1 is the CPU, with `threads` threads; others are CUDA's, on `stream`.
struct Place {
  int device;
  uintptr_t stream;
  int threads;
};

Place place(const char* operation, const py::tuple& given) {
  if (given.size() != 3) fail(operation, "place", "expected (device, stream, threads)");
  Place found{given[0].cast<int>(), given[1].cast<uintptr_t>(), given[2].cast<int>()};
  if (found.device < -1) fail(operation, "place", "expected a device index, or -1 for the CPU");
  if (found.device == -1 && found.threads < 1) fail(operation, "place", "expected at least one thread");
#ifndef LAYALIGN_HAVE_CUDA
  if (found.device >= 0) fail(operation, "place", "this module was built without CUDA");
#endif
  return found;
}

// Runs `on_cpu(threads)` or `on_cuda(launch)`, without Python's lock.
template <typename Cpu, typename Cuda>
void run(const Place& where, const Cpu& on_cpu, [[maybe_unused]] const Cuda& on_cuda) {
  py::gil_scoped_release unlocked;
  if (where.device < 0) return on_cpu(where.threads);
#ifdef LAYALIGN_HAVE_CUDA
  on_cuda(cuda::Launch{where.device, reinterpret_cast<void*>(where.stream)});
#endif
}

// The same for calls that only the CPU serves.
template <typename Call>
void run_on_cpu(const Call& call) {
  py::gil_scoped_release unlocked;
  call();
}

#ifdef LAYALIGN_HAVE_CUDA
#define ON_CUDA(function, call) [&](cuda::Launch launch) { cuda::function(call, launch); }
#else
#define ON_CUDA(function, call) nullptr
#endif
#define RUN(where, function, call) run(where, [&](int threads) { cpu::function(call, threads); }, ON_CUDA(function, call))

void mix_forward(const py::sequence& hidden, py::handle weight, py::handle bias, py::handle out, const py::tuple& where) {
  const char* name = "layer_mix";
  const auto layers = tensors(name, "hidden", hidden);
  const LayerMixForward call{layers.data(), static_cast<int>(layers.size()), tensor(name, "weight", weight),
                             tensor(name, "bias", bias), tensor(name, "out", out)};
  check(call);
  if (call.out) RUN(place(name, where), layer_mix_forward, call);
}

void mix_backward(const py::sequence& hidden, py::handle weight, py::handle grad, py::handle x, py::handle dweight,
                  py::handle dbias, py::handle dhidden, py::handle workspace, const py::tuple& where) {
  const char* name = "layer_mix_backward";
  const auto layers = tensors(name, "hidden", hidden);
  const LayerMixBackward call{layers.data(), static_cast<int>(layers.size()), tensor(name, "weight", weight),
                              tensor(name, "grad", grad), tensor(name, "x", x), tensor(name, "dweight", dweight),
                              tensor(name, "dbias", dbias), tensor(name, "dhidden", dhidden),
                              tensor(name, "workspace", workspace)};
  const Place at = place(name, where);
  check(call, mix_workspace(call, at.device));
  if (call.dweight || call.dhidden) RUN(at, layer_mix_backward, call);
}

bool pack_weight(py::handle weight, py::handle packed, int threads) {
  const char* name = "pack_weight";
  const PackWeight call{tensor(name, "weight", weight), tensor(name, "packed", packed)};
  check(call, threads);
  bool finite = false;
  run_on_cpu([&] { finite = cpu::pack_weight(call, threads); });
  return finite;
}

void projection_forward(const py::sequence& hidden, py::handle mix_weight, py::handle mix_bias, py::handle packed,
                        bool finite, py::handle bias, const py::sequence& out, int threads) {
  const char* name = "layer_projection";
  const auto layers = tensors(name, "hidden", hidden), outs = tensors(name, "out", out);
  const LayerProjectionForward call{layers.data(), static_cast<int>(layers.size()), tensor(name, "mix_weight", mix_weight),
                                    tensor(name, "mix_bias", mix_bias), tensor(name, "packed", packed),
                                    tensor(name, "bias", bias), outs.data(), finite};
  check(call, outs.size(), threads);
  run_on_cpu([&] { cpu::layer_projection_forward(call, threads); });
}

void projection_backward(py::handle x, const py::sequence& grad, py::handle dweight, int threads) {
  const char* name = "layer_projection_backward";
  const auto grads = tensors(name, "grad", grad);
  const LayerProjectionBackward call{tensor(name, "x", x), grads.data(), tensor(name, "dweight", dweight)};
  check(call, grads.size(), threads);
  run_on_cpu([&] { cpu::layer_projection_backward(call, threads); });
}

void batched_linear(const py::sequence& x, const py::sequence& weight, const py::sequence& bias,
                    const py::sequence& out, bool transposed, int threads) {
  const char* name = "batched_linear";
  const auto xs = tensors(name, "x", x), weights = tensors(name, "weight", weight), biases = tensors(name, "bias", bias),
             outs = tensors(name, "out", out);
  for (const auto& [argument, given] : {std::pair{"weight", &weights}, std::pair{"bias", &biases}, std::pair{"out", &outs}})
    if (given->size() != xs.size()) fail(name, argument, "expected one per matrix");
  if (xs.empty()) return;
  const BatchedLinear call{static_cast<int>(xs.size()), xs.data(), weights.data(), biases.data(), outs.data(),
                           transposed};
  check(call, threads);
  run_on_cpu([&] { cpu::batched_linear(call, threads); });
}

Attention attention(const char* name, const py::tuple& given) {
  if (given.size() != 7) fail(name, "inputs", "expected (query, key, value, gate, residual, key_mask, scale)");
  return Attention{tensor(name, "query", given[0]), tensor(name, "key", given[1]),   tensor(name, "value", given[2]),
                   tensor(name, "gate", given[3]),  tensor(name, "residual", given[4]),
                   tensor(name, "key_mask", given[5]),
                   given[6].cast<float>()};
}

void forward(const py::tuple& inputs, py::handle out, py::handle lse, const py::tuple& where) {
  const char* name = "gated_cross_attention";
  const AttentionForward call{attention(name, inputs), tensor(name, "out", out), tensor(name, "lse", lse)};
  check(call);
  if (call.out) RUN(place(name, where), gated_cross_attention_forward, call);
}

void decode(const py::tuple& inputs, py::handle out, int splits, py::handle workspace, const py::tuple& where) {
  const char* name = "gated_cross_attention_decode";
  const AttentionDecode call{attention(name, inputs), tensor(name, "out", out), splits,
                             tensor(name, "workspace", workspace)};
  const Place at = place(name, where);
  check(call, decode_workspace(call, at.device));
  if (call.out) RUN(at, gated_cross_attention_decode, call);
}

// Decoding on the CPU that is repeated with other tensors of the same kind: described and checked once, after that it
// takes addresses alone.
class CachedDecode {
 public:
  CachedDecode(const py::tuple& inputs, py::handle out)
      : call_{attention(kName, inputs), tensor(kName, "out", out), 1, {}} {
    check(call_, 0);
    if (!call_.in.residual) fail(kName, "residual", "expected a tensor");
  }

  void run(uintptr_t query, uintptr_t gate, uintptr_t residual, uintptr_t out, int threads) const {
    AttentionDecode call = call_;
    put(call.in.query, query), put(call.in.gate, gate), put(call.in.residual, residual), put(call.out, out);
    if (threads < 1) fail(kName, "threads", "expected at least one");
    run_on_cpu([&] { cpu::gated_cross_attention_decode(call, threads); });
  }

 private:
  static constexpr const char* kName = "gated_cross_attention_decode";

  static void put(Tensor& described, uintptr_t address) {
    if (address == 0) fail(kName, "address", "expected none of them to be null");
    described.data = reinterpret_cast<void*>(address);
  }

  AttentionDecode call_;
};

void backward(const py::tuple& inputs, py::handle grad, py::handle lse, py::handle dquery, py::handle dkey,
              py::handle dvalue, py::handle dgate, py::handle workspace, const py::tuple& where) {
  const char* name = "gated_cross_attention_backward";
  const AttentionBackward call{attention(name, inputs),      tensor(name, "grad", grad),
                               tensor(name, "lse", lse),     tensor(name, "dquery", dquery),
                               tensor(name, "dkey", dkey),   tensor(name, "dvalue", dvalue),
                               tensor(name, "dgate", dgate), tensor(name, "workspace", workspace)};
  const Place at = place(name, where);
  check(call, backward_workspace(call, at.device));
  if (call.dquery || call.dkey || call.dvalue || call.dgate) RUN(at, gated_cross_attention_backward, call);
}

// Elements of fp32 workspace that a call needs. Stand-ins for tensors are enough: no memory is read.
int64_t workspace_for_mix(int64_t slots, int64_t layers, int64_t batch, int64_t source, int64_t width, int device) {
  Tensor hidden, any;
  hidden.size[0] = batch, hidden.size[1] = source, hidden.size[2] = width;
  any.data = &any, any.size[0] = slots;
  LayerMixBackward call{&hidden, static_cast<int>(layers), any, {}, {}, any, any, {}, {}};
  return mix_workspace(call, device);
}

int64_t workspace_for_decode(const py::tuple& inputs, int splits, int device) {
  return decode_workspace(AttentionDecode{attention("gated_cross_attention_decode", inputs), {}, splits, {}}, device);
}

int64_t workspace_for_backward(const py::tuple& inputs, const std::vector<bool>& needs, int device) {
  const char* name = "gated_cross_attention_backward";
  if (needs.size() != 4) fail(name, "needs", "expected 4 of them");
  Tensor any;
  any.data = &any;
  const auto wanted = [&](int i) { return needs[i] ? any : Tensor{}; };
  return backward_workspace(
      AttentionBackward{attention(name, inputs), {}, {}, wanted(0), wanted(1), wanted(2), wanted(3), {}}, device);
}

}  // namespace
}  // namespace layalign

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)

PYBIND11_MODULE(LAYALIGN_MODULE, module) {
  using namespace layalign;
  module.doc() = "Kernels of layalign in C++ and CUDA; called by layalign.ops.extension only.";
  // Local: two such modules in one process (one of them emulated) each raise their own.
  py::register_local_exception<Error>(module, "Error", PyExc_RuntimeError);
  module.attr("version") = TEXT(LAYALIGN_VERSION);
#ifdef LAYALIGN_HAVE_CUDA
  module.attr("cuda") = true;
  module.def("decode_splits", [](const py::tuple& inputs, int device) {
    return cuda::decode_splits(attention("gated_cross_attention_decode", inputs), device);
  });
#else
  module.attr("cuda") = false;
#endif
#ifdef LAYALIGN_EMULATE_CUDA
  module.attr("emulated") = true;
#else
  module.attr("emulated") = false;
#endif
  module.def("instruction_set", &cpu::instruction_set);
  module.def("use_instruction_set", &cpu::use_instruction_set);
  module.def("layer_mix_forward", &mix_forward);
  module.def("layer_mix_backward", &mix_backward);
  module.def("packed_width", &cpu::packed_width);
  module.def("pack_weight", &pack_weight);
  module.def("layer_projection_forward", &projection_forward);
  module.def("layer_projection_backward", &projection_backward);
  module.def("batched_linear", &batched_linear);
  module.def("gated_cross_attention_forward", &forward);
  module.def("gated_cross_attention_decode", &decode);
  py::class_<CachedDecode>(module, "CachedDecode")
      .def(py::init<const py::tuple&, py::handle>())
      .def("__call__", &CachedDecode::run);
  module.def("gated_cross_attention_backward", &backward);
  module.def("layer_mix_workspace", &workspace_for_mix);
  module.def("decode_workspace", &workspace_for_decode);
  module.def("backward_workspace", &workspace_for_backward);
}
