// The forward and decode kernels for BFloat.
#include "gated_cross_attention_forward.cuh"

namespace layalign::cuda {
template void attention_rows<BFloat>(const AttentionParameters&, int64_t, bool, const char*, Launch);
}  // namespace layalign::cuda
