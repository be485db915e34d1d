// The forward and decode kernels for float.
#include "gated_cross_attention_forward.cuh"

namespace layalign::cuda {
template void attention_rows<float>(const AttentionParameters&, int64_t, bool, const char*, Launch);
}  // namespace layalign::cuda
