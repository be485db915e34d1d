// Layer mix: from the call to its kernels, and the second stage of the weight's gradient.
#include "layer_mix.cuh"

#include <algorithm>

namespace layalign::cuda {
namespace {

constexpr int64_t kUnits = 2048;  // warps (or blocks, in fp32) of the first stage; fixed, so that the order of sums is
constexpr int kSums = 32, kSlices = 8;

int64_t weight_parts(int64_t slots, int64_t rows, int64_t width) {
  const int64_t tiles = rows * ceil_div<int64_t>(width, kMixColumns);
  return std::min(tiles, std::max<int64_t>(1, kUnits / std::max<int64_t>(1, ceil_div<int64_t>(slots, 16))));
}

// dweight and dbias from the parts: 32 sums a block, each in 8 slices that are added in a fixed order.
__global__ void __launch_bounds__(kSums * kSlices) sum_kernel(KERNEL_PARAMETER MixParameters p) {
  float* slices = reinterpret_cast<float*>(shared_memory());  // [kSlices][kSums]
  const int lane = lane_index(), slice = warp_index(), row = p.layers_count + 1;
  const int64_t sums = static_cast<int64_t>(p.slots) * row, i = block_index() * kSums + lane;
  const int64_t parts = p.parts, share = (parts + kSlices - 1) / kSlices;
  const int64_t end = (slice + 1) * share < parts ? (slice + 1) * share : parts;
  float total = 0.0f;
  if (i < sums) {
    for (int64_t part = slice * share; part < end; ++part) total += p.partial[part * sums + i];
  }
  slices[slice * kSums + lane] = total;
  sync_threads();
  if (slice != 0 || i >= sums) return;
  for (int s = 1; s < kSlices; ++s) total += slices[s * kSums + lane];
  const int64_t j = i / row;
  const int e = static_cast<int>(i - j * row);
  if (e < p.layers_count) {
    p.dweight[j * p.layers_count + e] = total;
  } else if (p.dbias) {
    p.dbias[j] = total;
  }
}

MixParameters parameters(const Tensor* hidden, int layers, const Tensor& weight) {
  if (layers < 1 || layers > kMaxLayers) throw Error("layer_mix (cuda): between 1 and 64 layers, please");
  if (weight.size[0] > kMaxSlots) throw Error("layer_mix (cuda): at most 256 slots, please");
  MixParameters p{};
  p.layers_count = layers;
  p.slots = static_cast<int>(weight.size[0]);
  p.rows = hidden[0].size[0] * hidden[0].size[1];
  p.source = static_cast<uint32_t>(hidden[0].size[1]);
  p.width = hidden[0].size[2];
  p.weight = weight.data;
  p.weight_stride = weight.stride[0];
  p.weight_dtype = weight.dtype;
  p.vector_hidden = p.width * bytes_of(hidden[0].dtype) % 16 == 0;
  for (int e = 0; e < layers; ++e) {
    p.layers.data[e] = hidden[e].data;
    p.layers.stride_b[e] = hidden[e].stride[0];
    p.layers.stride_s[e] = hidden[e].stride[1];
    p.vector_hidden = p.vector_hidden && rows_aligned(hidden[e], 16);
  }
  return p;
}

// Tiles of `columns` columns, and how many of them go to a block: enough blocks first, then work for each.
void divide(MixParameters& p, int64_t columns, int64_t together) {
  const int64_t across = ceil_div(p.width, columns), tiles = p.rows * across;
  if (tiles > 0x7fffffff || p.rows > 0x7fffffff) throw Error("layer_mix (cuda): the hidden states are too large");
  p.columns = static_cast<uint32_t>(across);
  p.tiles = static_cast<uint32_t>(tiles);
  p.per_block = static_cast<uint32_t>(together * std::min<int64_t>(8, std::max<int64_t>(1, tiles / (together * 1024))));
}

bool contiguous_aligned(const void* data, int64_t width, DType dtype) {
  return aligned(data, 16) && width * bytes_of(dtype) % 16 == 0;
}

}  // namespace

int64_t layer_mix_workspace(int64_t slots, int64_t layers, int64_t rows, int64_t width) {
  return weight_parts(slots, rows, width) * slots * (layers + 1);
}

void layer_mix_forward(const LayerMixForward& call, Launch launch) {
  MixParameters p = parameters(call.hidden, call.layers, call.weight);
  const DType dtype = call.hidden[0].dtype;
  p.bias = call.bias.data;
  p.bias_dtype = call.bias.dtype;
  p.out = call.out.data;
  p.vector_out = contiguous_aligned(p.out, p.width, dtype);
  if (p.slots == 0) return;
  if (dtype == DType::float32) {
    divide(p, kMixColumnsFloat, 1);
    mix_forward_float(p, launch);
  } else {
    divide(p, kMixColumns, kMixThreads / 32);
    mix_forward_half(p, dtype, launch);
  }
}

void layer_mix_backward(const LayerMixBackward& call, Launch launch) {
  MixParameters p = parameters(call.hidden, call.layers, call.weight);
  const DType dtype = call.hidden[0].dtype;
  p.grad = call.grad.data;
  p.grad_j = call.grad.stride[0];
  p.grad_b = call.grad.stride[1];
  p.grad_s = call.grad.stride[2];
  p.x = call.x.data;
  p.vector_grad = contiguous_aligned(p.x, p.width, dtype) && rows_aligned(call.grad, 16);
  if (call.dhidden) {
    p.out = call.dhidden.data;
    p.vector_out = contiguous_aligned(p.out, p.width, dtype);
    if (dtype == DType::float32) {
      divide(p, kMixColumnsFloat, 1);
      mix_hidden_float(p, launch);
    } else {
      divide(p, kMixColumns, kMixThreads / 32);
      mix_hidden_half(p, dtype, launch);
    }
  }
  if (call.dweight) {
    divide(p, kMixColumns, 1);
    p.parts = static_cast<uint32_t>(weight_parts(p.slots, p.rows, p.width));
    p.partial = static_cast<float*>(call.workspace.data);
    p.dweight = static_cast<float*>(call.dweight.data);
    p.dbias = static_cast<float*>(call.dbias.data);
    if (dtype == DType::float32) {
      mix_weight_float(p, launch);
    } else {
      mix_weight_half(p, dtype, launch);
    }
    const int64_t sums = static_cast<int64_t>(p.slots) * (p.layers_count + 1);
    queue("layer_mix", sum_kernel, ceil_div<int64_t>(sums, kSums), kSums * kSlices, kSums * kSlices * sizeof(float),
          launch, p);
  }
}

}  // namespace layalign::cuda
