// See probes.h. A file of its own, because kernels are watched and programs that check them are not.
#include "probes.h"

#include "../cuda/launch.cuh"

namespace layalign::cuda {
namespace {

void probe_kernel(const Probe p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = thread_index();
  cp_async4(shared + i, p.in + i);
  if (p.mode != 3) cp_async_wait();
  if (p.mode != 2 && (p.mode != 1 || i < 40)) sync_threads();
  p.out[i] = shared[63 - i];
  if (p.mode == 3) cp_async_wait();
  if (p.mode < 4) return;
  sync_threads();
  if (p.mode == 4) cp_async4(shared + 61 + i, p.in + i), cp_async_wait();
  if (p.mode == 5) shared[i / 2] = 0.0f;
  float* const mine = shared + 32 * warp_index();
  if (p.mode == 6 && mine[lane_index() / 2] != infinity()) mine[lane_index()] = 0.0f;
  if (p.mode == 7) mine[lane_index()] = mine[lane_index() ^ 1];
  if (p.mode == 8) {
    const float other = mine[lane_index() ^ 1];
    sync_warp();
    mine[lane_index()] = other;
    sync_warp();
    if (mine[lane_index() ^ 1] == infinity()) p.out[i] = 0.0f;
  }
}

// One access by one warp, the stores by all lanes to places of their own.
void pattern_kernel(const Probe p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int i = lane_index(), pattern = p.mode - 100;
  volatile float* const words = shared;
  if (pattern == 0) words[i] = 0.0f;
  if (pattern == 1) words[32 * i] = 0.0f;
  if (pattern == 2 && i % 2) words[i < 16 ? i : i + 16 * 32 - 16] = 0.0f;
  if (pattern == 3) p.out[i] = words[7];
  if (pattern == 4) store_float2(shared + 2 * i, Float2{});
  if (pattern == 5) store_float2(shared + 32 * i, Float2{});
  if (pattern == 6) store_float4(shared + 4 * i, Float4{});
  if (pattern == 7) store_float4(shared + 32 * i, Float4{});
  if (pattern == 8) p.out[i] = load_float4(shared + i % 4 * 32 + i % 4 * 4).at[0];
}

}  // namespace

void probe(const Probe& parameters) {
  const Launch launch{0, nullptr};
  if (parameters.mode < 100) return queue("probe", probe_kernel, 1, 64, 256, launch, parameters);
  queue("probe", pattern_kernel, 1, 32, 32 * 32 * 4, launch, parameters);
}

}  // namespace layalign::cuda
