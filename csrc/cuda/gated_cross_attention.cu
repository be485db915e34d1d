// Gated cross-attention: from the call to its kernels, and the small kernels that finish what was split.
#include "gated_cross_attention.cuh"

#include <algorithm>
#include <atomic>

namespace layalign::cuda {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr const char* kForward = "gated_cross_attention";
constexpr const char* kDecode = "gated_cross_attention_decode";
constexpr int kFewRows = 16;    // so many packed rows fit one warp
constexpr int kDecodeStep = 64;  // parts of the source are multiples of it

constexpr int kWarpRows = 4;  // rows of a block of the combining kernel, a warp each

// One row of the decode from its parts, weighted by their log-sum-exp, in order; then gate and residual.
template <typename T>
__global__ void __launch_bounds__(32 * kWarpRows) combine_kernel(KERNEL_PARAMETER AttentionParameters p) {
  const int64_t row = block_index() * kWarpRows + warp_index();
  if (row >= p.part_rows) return;
  const int h = static_cast<int>(row % p.heads);
  const int64_t t = row / p.heads % p.length, b = row / p.heads / p.length;
  float highest = -infinity(), sum = 0.0f;
  for (int i = 0; i < p.splits; ++i) highest = maximum(highest, p.part_lse[i * p.part_rows + row]);
  const float reference = highest == -infinity() ? 0.0f : highest;
  for (int i = 0; i < p.splits; ++i) sum += exp2_fast(p.part_lse[i * p.part_rows + row] - reference);
  const float factor = (sum == 0.0f ? 0.0f : 1.0f / sum) * load_any(p.gate, 0, p.gate_dtype);
  for (int column = lane_index(); column < p.size; column += 32) {
    float x = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
      const int64_t part = i * p.part_rows + row;
      x += exp2_fast(p.part_lse[part] - reference) * p.part[part * p.size + column];
    }
    x *= factor;
    const int64_t residual_at = b * p.residual_b + t * p.residual_t + h * p.residual_h + column;
    if (p.residual) x += load_any(p.residual, residual_at, p.residual_dtype);
    from_float(static_cast<T*>(p.out) + row * p.size + column, x);
  }
}

struct SumParameters {
  const float* part;  // [splits][rows][size]
  void* out;          // (B, G, S, d)
  int64_t rows, stride_b, stride_g, stride_s;
  int size, splits, groups, source;
};
constexpr int kSumThreads = 256;

// A gradient of the source from its parts, in order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(KERNEL_PARAMETER SumParameters p) {
  const int64_t i = block_index() * kSumThreads + thread_index(), all = p.rows * p.size;
  if (i >= all) return;
  float x = 0.0f;
  for (int split = 0; split < p.splits; ++split) x += p.part[split * all + i];
  const int64_t row = i / p.size, column = i - row * p.size, s = row % p.source, rest = row / p.source;
  const int64_t g = rest % p.groups, b = rest / p.groups;
  from_float(static_cast<T*>(p.out) + b * p.stride_b + g * p.stride_g + s * p.stride_s + column, x);
}

struct GateParameters {
  const float* part;
  float* out;
  int64_t count;
};

// The gate's gradient from its parts: 256 sums of every 256th, then pairs of them.
__global__ void __launch_bounds__(kSumThreads) sum_gate_kernel(KERNEL_PARAMETER GateParameters p) {
  float* sums = reinterpret_cast<float*>(shared_memory());
  float sum = 0.0f;
  for (int64_t i = thread_index(); i < p.count; i += kSumThreads) sum += p.part[i];
  sums[thread_index()] = sum;
  for (int step = kSumThreads / 2; step; step /= 2) {
    sync_threads();
    if (thread_index() < step) sums[thread_index()] += sums[thread_index() + step];
  }
  if (thread_index() == 0) *p.out = sums[0];
}

// -- calls ------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t batch, heads, length, size, groups, source;
  explicit Sizes(const Attention& in)
      : batch(in.query.size[0]), heads(in.query.size[1]), length(in.query.size[2]), size(in.query.size[3]),
        groups(in.key.size[1]), source(in.key.size[2]) {}
  int64_t rows() const { return groups ? heads / groups * length : 0; }
};

// The numbers of BlockShape<T, D> that the host needs.
struct Blocks {
  int rows, queries;
};
template <typename T>
Blocks blocks_of(int64_t size) {
  if (size <= 64) return Blocks{16 * BlockShape<T, 64>::kWarps, BlockShape<T, 64>::kQueries};
  if (size <= 128) return Blocks{16 * BlockShape<T, 128>::kWarps, BlockShape<T, 128>::kQueries};
  return Blocks{16 * BlockShape<T, 256>::kWarps, BlockShape<T, 256>::kQueries};
}
Blocks blocks_of(const Attention& in) {
  return in.query.dtype == DType::float32 ? blocks_of<float>(in.query.size[3]) : blocks_of<Half>(in.query.size[3]);
}

AttentionParameters parameters(const Attention& in, const char* name) {
  const Sizes n(in);
  if (n.size < 1 || n.size > kMaxHeadSize) throw Error(std::string(name) + " (cuda): head sizes are 1 to 256");
  if (n.rows() > 0x7fff0000 || n.source > 0x7fff0000) throw Error(std::string(name) + " (cuda): too many tokens");
  AttentionParameters p{};
  p.query = in.query.data;
  p.key = in.key.data;
  p.value = in.value.data;
  p.gate = in.gate.data;
  p.residual = in.residual.data;
  p.mask = static_cast<const unsigned char*>(in.key_mask.data);
  p.query_b = in.query.stride[0], p.query_h = in.query.stride[1], p.query_t = in.query.stride[2];
  p.key_b = in.key.stride[0], p.key_g = in.key.stride[1], p.key_s = in.key.stride[2];
  p.value_b = in.value.stride[0], p.value_g = in.value.stride[1], p.value_s = in.value.stride[2];
  p.residual_b = in.residual.stride[0], p.residual_t = in.residual.stride[1], p.residual_h = in.residual.stride[2];
  p.mask_b = in.key_mask.stride[0], p.mask_s = in.key_mask.stride[1];
  p.heads = static_cast<int>(n.heads);
  p.groups = static_cast<int>(n.groups);
  p.repeat = n.groups ? static_cast<int>(n.heads / n.groups) : 0;
  p.length = static_cast<int>(n.length);
  p.source = static_cast<int>(n.source);
  p.size = static_cast<int>(n.size);
  p.rows = static_cast<int>(n.rows());
  p.scale = in.scale;
  p.scale2 = in.scale * kLog2E;
  p.gate_dtype = in.gate.dtype;
  p.residual_dtype = in.residual.dtype;
  const bool chunks = n.size * bytes_of(in.query.dtype) % 16 == 0;
  p.vector_query = chunks && rows_aligned(in.query, 16);
  p.vector_source = chunks && rows_aligned(in.key, 16) && rows_aligned(in.value, 16);
  p.vector_grad = chunks;
  p.splits = 1;
  p.span = std::max(p.source, 1);
  return p;
}

// Whether rows of `x` can be stored four numbers at a time.
bool stores_aligned(const Tensor& x, int64_t size) {
  return size % 4 == 0 && rows_aligned(x, 4 * bytes_of(x.dtype));
}

template <template <typename> class Function, typename... Arguments>
void by_type(DType dtype, const Arguments&... arguments) {
  if (dtype == DType::float32) {
    Function<float>::call(arguments...);
  } else if (dtype == DType::float16) {
    Function<Half>::call(arguments...);
  } else {
    Function<BFloat>::call(arguments...);
  }
}

template <typename T>
struct Rows {
  static void call(const AttentionParameters& p, int64_t batch, bool few, const char* name, Launch launch) {
    attention_rows<T>(p, batch, few, name, launch);
  }
};
template <typename T>
struct Combine {
  static void call(const AttentionParameters& p, Launch launch) {
    queue(kDecode, combine_kernel<T>, ceil_div<int64_t>(p.part_rows, kWarpRows), 32 * kWarpRows, 0, launch, p);
  }
};
template <typename T>
struct Backward {
  static void call(const AttentionParameters& rows, const AttentionParameters& source, int64_t batch, Launch launch) {
    if (rows.tiles) attention_dquery<T>(rows, batch, launch);
    if (source.dkey || source.dvalue) attention_dsource<T>(source, batch, launch);
  }
};
template <typename T>
struct SumParts {
  static void call(const SumParameters& p, Launch launch) {
    queue(kForward, sum_parts_kernel<T>, ceil_div<int64_t>(p.rows * p.size, kSumThreads), kSumThreads, 0, launch, p);
  }
};

}  // namespace

void gated_cross_attention_forward(const AttentionForward& call, Launch launch) {
  AttentionParameters p = parameters(call.in, kForward);
  p.out = call.out.data;
  p.lse = static_cast<float*>(call.lse.data);
  p.vector_out = stores_aligned(call.out, p.size);
  p.tiles = ceil_div(p.rows, blocks_of(call.in).rows);
  set_divisors(p);
  by_type<Rows>(call.in.query.dtype, p, call.in.query.size[0], false, kForward, launch);
}

// -- decode -----------------------------------------------------------------------------------------------------------

int64_t decode_workspace(const AttentionDecode& call) {
  const Sizes n(call.in);
  return call.splits > 1 ? call.splits * n.batch * n.length * n.heads * (n.size + 1) : 0;
}

int decode_splits(const Attention& in, int device) {
  int processors = 16;
#ifndef LAYALIGN_EMULATE_CUDA
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  processors = device >= 0 && device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (!processors) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), kDecode);
    if (device >= 0 && device < kDevices) known[device].store(processors, std::memory_order_relaxed);
  }
#else
  (void)device;
#endif
  // Two blocks on every processor, each with two steps of the source at least.
  const Sizes n(in);
  const int64_t block = n.rows() <= kFewRows ? kFewRows : blocks_of(in).rows;
  const int64_t blocks = std::max<int64_t>(1, n.batch * n.groups * ceil_div(n.rows(), block));
  const int64_t steps = ceil_div<int64_t>(n.source, 2 * kDecodeStep);
  const int64_t wanted = std::min(ceil_div<int64_t>(2 * processors, blocks), steps);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, 64)));
}

void gated_cross_attention_decode(const AttentionDecode& call, Launch launch) {
  AttentionParameters p = parameters(call.in, kDecode);
  const Sizes n(call.in);
  const bool few = p.rows <= kFewRows;
  p.out = call.out.data;
  p.vector_out = stores_aligned(call.out, p.size);
  p.tiles = ceil_div(p.rows, few ? kFewRows : blocks_of(call.in).rows);
  if (call.splits > 1) {
    p.splits = call.splits;
    p.span = std::max(1, ceil_div(ceil_div(p.source, kDecodeStep), p.splits)) * kDecodeStep;
    p.part_rows = n.batch * n.length * n.heads;
    p.part = static_cast<float*>(call.workspace.data);
    p.vector_part = p.size % 4 == 0 && aligned(p.part, 16);
    p.part_lse = p.part + p.splits * p.part_rows * p.size;
  }
  set_divisors(p);
  by_type<Rows>(call.in.query.dtype, p, n.batch, few, kDecode, launch);
  if (p.part) by_type<Combine>(call.in.query.dtype, p, launch);
}

// -- backward ---------------------------------------------------------------------------------------------------------

namespace {

// How the backward divides its work and its workspace: a function of the call's shape alone, so that results are too.
struct BackwardPlan {
  int64_t row_tiles, source_tiles, gate_parts, delta, inverse, before_parts, part;  // from gate_parts on in elements
  int splits, span;
  bool need_rows;

  explicit BackwardPlan(const AttentionBackward& call) {
    const Sizes n(call.in);
    const Blocks blocks = blocks_of(call.in);
    const bool normalize = call.in.query.dtype == DType::float32 && (call.dkey || call.dvalue);
    need_rows = call.dquery || call.dkey || call.dgate || normalize;
    row_tiles = ceil_div<int64_t>(n.rows(), blocks.rows);
    source_tiles = ceil_div<int64_t>(n.source, blocks.rows);
    gate_parts = call.dgate ? n.batch * n.groups * row_tiles : 0;
    delta = call.dkey ? n.batch * n.heads * n.length : 0;
    inverse = normalize ? n.batch * n.heads * n.length : 0;
    before_parts = ceil_div<int64_t>(gate_parts + delta + inverse, 4) * 4;  // so that the parts are aligned
    // Enough blocks for the largest devices; four tiles of rows stay with each, and at most 16 share a tile of tokens.
    const int64_t tiles = ceil_div<int64_t>(n.rows(), blocks.queries);
    const int64_t programs = std::max<int64_t>(1, n.batch * n.groups * source_tiles);
    const int64_t wanted = std::min({ceil_div<int64_t>(256, programs), tiles / 4, int64_t{16}});
    span = static_cast<int>(ceil_div(std::max<int64_t>(1, tiles), std::max<int64_t>(1, wanted)));
    splits = static_cast<int>(ceil_div<int64_t>(std::max<int64_t>(1, tiles), span));
    part = splits > 1 ? splits * n.batch * n.groups * n.source * n.size : 0;
  }
  int64_t workspace(const AttentionBackward& call) const {
    return part ? before_parts + part * ((call.dkey ? 1 : 0) + (call.dvalue ? 1 : 0)) : before_parts;
  }
};

void sum_source(const AttentionBackward& call, const AttentionParameters& p, const float* part, const Tensor& out,
                Launch launch) {
  SumParameters s{};
  s.part = part;
  s.out = out.data;
  s.rows = p.part_rows;
  s.stride_b = out.stride[0], s.stride_g = out.stride[1], s.stride_s = out.stride[2];
  s.size = p.size;
  s.splits = p.splits;
  s.groups = p.groups;
  s.source = p.source;
  by_type<SumParts>(call.in.query.dtype, s, launch);
}

}  // namespace

int64_t gated_cross_attention_backward_workspace(const AttentionBackward& call) {
  return BackwardPlan(call).workspace(call);
}

void gated_cross_attention_backward(const AttentionBackward& call, Launch launch) {
  const BackwardPlan plan(call);
  AttentionParameters p = parameters(call.in, kForward);
  const Sizes n(call.in);
  float* workspace = static_cast<float*>(call.workspace.data);
  p.grad = call.grad.data;
  p.grad_b = call.grad.stride[0], p.grad_t = call.grad.stride[1], p.grad_h = call.grad.stride[2];
  p.vector_grad = p.vector_grad && rows_aligned(call.grad, 16);
  p.lse = static_cast<float*>(call.lse.data);
  p.delta = plan.delta ? workspace : nullptr;
  p.inverse = plan.inverse ? workspace + plan.delta : nullptr;
  p.dgate_part = plan.gate_parts ? workspace + plan.delta + plan.inverse : nullptr;
  p.dquery = call.dquery.data;
  p.dquery_b = call.dquery.stride[0], p.dquery_h = call.dquery.stride[1], p.dquery_t = call.dquery.stride[2];
  p.vector_dquery = stores_aligned(call.dquery, p.size);
  p.dkey = call.dkey.data;
  p.dkey_b = call.dkey.stride[0], p.dkey_g = call.dkey.stride[1], p.dkey_s = call.dkey.stride[2];
  p.vector_dkey = stores_aligned(call.dkey, p.size);
  p.dvalue = call.dvalue.data;
  p.dvalue_b = call.dvalue.stride[0], p.dvalue_g = call.dvalue.stride[1], p.dvalue_s = call.dvalue.stride[2];
  p.vector_dvalue = stores_aligned(call.dvalue, p.size);

  AttentionParameters source = p;
  source.tiles = static_cast<int>(plan.source_tiles);
  source.splits = plan.splits;
  source.span = plan.span;
  source.part_rows = n.batch * n.groups * n.source;
  if (plan.part) {
    float* next = workspace + plan.before_parts;
    source.vector_part = p.size % 4 == 0 && aligned(workspace, 16);
    if (call.dkey) source.dkey_part = next, next += plan.part;
    if (call.dvalue) source.dvalue_part = next;
  }
  p.tiles = plan.need_rows ? static_cast<int>(plan.row_tiles) : 0;
  set_divisors(p);
  set_divisors(source);
  by_type<Backward>(call.in.query.dtype, p, source, n.batch, launch);
  if (source.dkey_part) sum_source(call, source, source.dkey_part, call.dkey, launch);
  if (source.dvalue_part) sum_source(call, source, source.dvalue_part, call.dvalue, launch);
  if (call.dgate) {
    const GateParameters gate{p.dgate_part, static_cast<float*>(call.dgate.data), plan.gate_parts};
    queue(kForward, sum_gate_kernel, 1, kSumThreads, kSumThreads * sizeof(float), launch, gate);
  }
}

}  // namespace layalign::cuda
