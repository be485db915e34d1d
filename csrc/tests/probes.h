// Small kernels that show what the software device notices.
#pragma once

namespace layalign::cuda {

struct Probe {
  float* out;
  const float* in;
  int mode;
};
// Reverses 64 numbers in shared memory. Mode 0 and 8: right, the others have a mistake each; 100 and more: one warp's
// access in some pattern of banks.
void probe(const Probe& parameters);

}  // namespace layalign::cuda
