// The backward kernels for BFloat.
#include "gated_cross_attention_backward.cuh"

namespace layalign::cuda {
template void attention_dquery<BFloat>(const AttentionParameters&, int64_t, Launch);
template void attention_dsource<BFloat>(const AttentionParameters&, int64_t, Launch);
}  // namespace layalign::cuda
