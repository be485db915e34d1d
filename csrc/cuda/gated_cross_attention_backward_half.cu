// The backward kernels for Half.
#include "gated_cross_attention_backward.cuh"

namespace layalign::cuda {
template void attention_dquery<Half>(const AttentionParameters&, int64_t, Launch);
template void attention_dsource<Half>(const AttentionParameters&, int64_t, Launch);
}  // namespace layalign::cuda
