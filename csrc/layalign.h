// What the kernels compute, for every device, on raw memory with sizes and strides. Nothing here knows torch.
//
// The mathematics is that of layalign/reference.py, under the same names. Letters: B batch, S source tokens, T language
// model tokens, E encoder layers, J = 2L slots, D encoder width, H query heads, G key/value heads, d head size.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace layalign {

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2, boolean = 3 };

// A tensor somewhere in the memory of one device. `data` null: absent. Strides count elements; where a tensor is not
// null its last stride is 1 and its sizes have been checked against the other arguments by the binding.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  int dims = 0;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  explicit operator bool() const { return data != nullptr; }
};

constexpr int kMaxLayers = 64;    // E
constexpr int kMaxSlots = 256;    // J
constexpr int kMaxHeadSize = 256; // d

// x[j] = relu(sum_e weight[j, e] * hidden[e] + bias[j])
struct LayerMixForward {
  const Tensor* hidden;  // E tensors (B, S, D), one dtype, each with its own strides
  int layers;            // E
  Tensor weight;         // (J, E), any floating dtype, any strides over J
  Tensor bias;           // (J,) or absent, any floating dtype
  Tensor out;            // (J, B, S, D) contiguous, hidden's dtype
};

// With g[j] = grad[j] where x[j] > 0, else 0:
//   dweight[j, e] = sum_bsd g[j] * hidden[e];  dbias[j] = sum_bsd g[j];  dhidden[e] = sum_j weight[j, e] * g[j]
// The sums over (B, S, D) are taken in a fixed order: the same bits for any number of threads.
struct LayerMixBackward {
  const Tensor* hidden;  // as above
  int layers;
  Tensor weight;
  Tensor grad;       // (J, B, S, D), x's dtype, any strides with a unit last one
  Tensor x;          // (J, B, S, D) contiguous: the forward's output
  Tensor dweight;    // (J, E) fp32 contiguous, or absent (then dbias is absent too)
  Tensor dbias;      // (J,) fp32
  Tensor dhidden;    // (E, B, S, D) contiguous in hidden's dtype, or absent
  Tensor workspace;  // fp32, layer_mix_workspace(...) elements; absent where that is 0
};

// The CPU's layer projection reads weights packed: packed_width() columns side by side, zeros at the end.
struct PackWeight {
  Tensor weight;  // (J, N, K) fp32 with a unit last stride
  Tensor packed;  // (J, ceil(N / width), K, width) fp32 contiguous, written
};

// out[j] = relu(sum_e mix_weight[j, e] * hidden[e] + mix_bias[j]) @ weight[j].T + bias[j], on the CPU, fp32. The relu's
// zeros are skipped.
struct LayerProjectionForward {
  const Tensor* hidden;  // E of (B, S, K), fp32, unit last stride
  int layers;
  Tensor mix_weight, mix_bias;  // (J, E) floating, unit last stride; (J) floating or absent
  Tensor packed;                // of J weights, or of one that all slots share
  Tensor bias;                  // (J, N) fp32, unit last stride, or absent
  const Tensor* out;            // J tensors (B, S, N) fp32 contiguous
  bool finite;                  // whether the packed weight is
};

// dweight[j] += x[j].T @ grad[j], or their sum into one dweight, on the CPU; the same bits for any number of threads.
struct LayerProjectionBackward {
  Tensor x;            // (J, R, K) fp32 contiguous
  const Tensor* grad;  // J tensors (R, N) fp32 with a unit last stride, absent where there is none
  Tensor dweight;      // (1 or J, K, N) fp32 contiguous, added to
};

// out[j] = x[j] @ weight[j].T + bias[j] where transposed, else x[j] @ weight[j] + bias[j]; on the CPU, fp32, unit last
// strides.
struct BatchedLinear {
  int count;             // J
  const Tensor* x;       // J of (R, K)
  const Tensor* weight;  // J of (N, K) where transposed, else (K, N)
  const Tensor* bias;    // J of (N,), or absent
  const Tensor* out;     // J of (R, N), written
  bool transposed;
};

// out[b, t, h] = residual[b, t, h] + gate * sum_s softmax_s(query[b, h, t] . key[b, g, s] * scale) * value[b, g, s]
// with g = h / (H / G). A row whose key_mask is all false contributes zero. Values under a false mask, even NaN, have
// no influence. Softmax and sums in fp32.
struct Attention {
  Tensor query;     // (B, H, T, d), fp32, fp16 or bf16
  Tensor key;       // (B, G, S, d), query's dtype
  Tensor value;     // (B, G, S, d), query's dtype
  Tensor gate;      // one number, any floating dtype, read on the device
  Tensor residual;      // (B, T, H, d) or absent, any floating dtype
  Tensor key_mask;  // (B, S) boolean, any strides, or absent
  float scale;
};

struct AttentionForward {
  Attention in;
  Tensor out;  // (B, T, H, d) contiguous, query's dtype
  Tensor lse;  // (B, H, T) fp32 contiguous: log2 of sum_s 2^(score * log2(e)), -inf where nothing is attended
};

// T is small (at most 16); the heads of a group share one pass over the source, which may be split.
struct AttentionDecode {
  Attention in;
  Tensor out;        // (B, T, H, d) contiguous, query's dtype
  int splits;        // parts of the source that run in parallel; 1: no workspace
  Tensor workspace;  // fp32, decode_workspace(...) elements; absent where that is 0
};

// With P = softmax, A = P v, g = grad * gate:
//   dvalue = P^T g;  delta[t] = sum_s P * (g v^T);  dscore = P * (g v^T - delta);  dquery = dscore k * scale;
//   dkey = dscore^T q * scale (both summed over the heads of a group);  dgate = sum grad * A.
struct AttentionBackward {
  Attention in;      // residual is ignored
  Tensor grad;       // (B, T, H, d), query's dtype, any strides with a unit last one
  Tensor lse;        // the forward's
  Tensor dquery;     // (B, H, T, d), query's dtype, unit last stride, or absent
  Tensor dkey;       // (B, G, S, d), likewise
  Tensor dvalue;     // (B, G, S, d), likewise
  Tensor dgate;      // one fp32 number, or absent
  Tensor workspace;  // fp32, gated_cross_attention_backward_workspace(...) elements; absent where that is 0
};

// Thrown by the kernels' callers; a Python exception in the binding. The text begins with the operation's name.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace cpu {
// `threads`: at most this many, of torch's own pool.
void layer_mix_forward(const LayerMixForward& call, int threads);
void layer_mix_backward(const LayerMixBackward& call, int threads);
int64_t layer_mix_workspace(int64_t slots, int64_t layers, int64_t rows, int64_t width);
int64_t packed_width();
bool pack_weight(const PackWeight& call, int threads);  // whether the weight is finite
void layer_projection_forward(const LayerProjectionForward& call, int threads);
void layer_projection_backward(const LayerProjectionBackward& call, int threads);
void batched_linear(const BatchedLinear& call, int threads);
void gated_cross_attention_forward(const AttentionForward& call, int threads);
void gated_cross_attention_decode(const AttentionDecode& call, int threads);
void gated_cross_attention_backward(const AttentionBackward& call, int threads);
const char* instruction_set();                          // the one in use: "avx512", "avx2", "neon" or "baseline"
bool use_instruction_set(const char* name);             // false where this machine lacks it; for tests
}  // namespace cpu

namespace cuda {
struct Launch {
  int device;    // index as CUDA counts
  void* stream;  // cudaStream_t; the work is queued there and nothing waits for it
};
// All of them capture into CUDA graphs: no allocation, no synchronisation, nothing read back.
void layer_mix_forward(const LayerMixForward& call, Launch launch);
void layer_mix_backward(const LayerMixBackward& call, Launch launch);
int64_t layer_mix_workspace(int64_t slots, int64_t layers, int64_t rows, int64_t width);
void gated_cross_attention_forward(const AttentionForward& call, Launch launch);
void gated_cross_attention_decode(const AttentionDecode& call, Launch launch);
int64_t decode_workspace(const AttentionDecode& call);  // elements, for call.splits
int decode_splits(const Attention& in, int device);     // how many parts suit this device
void gated_cross_attention_backward(const AttentionBackward& call, Launch launch);
int64_t gated_cross_attention_backward_workspace(const AttentionBackward& call);
}  // namespace cuda

}  // namespace layalign
