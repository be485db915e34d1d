// The backward kernels for float.
#include "gated_cross_attention_backward.cuh"

namespace layalign::cuda {
template void attention_dquery<float>(const AttentionParameters&, int64_t, Launch);
template void attention_dsource<float>(const AttentionParameters&, int64_t, Launch);
}  // namespace layalign::cuda
