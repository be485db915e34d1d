// How kernels are launched: on the caller's device and stream, with every return code checked, without waiting.
#pragma once

#include "../layalign.h"
#include "ptx.cuh"

#include <cstddef>
#include <string>

namespace layalign::cuda {

#ifndef LAYALIGN_EMULATE_CUDA

inline void check(cudaError_t code, const char* operation) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that it is reported once
  throw Error(std::string(operation) + " (cuda): " + cudaGetErrorString(code));
}

// Makes `device` the current one for the lifetime of this object.
class DeviceScope {
 public:
  DeviceScope(int device, const char* operation) {
    check(cudaGetDevice(&before_), operation);
    if (before_ == device) return;
    check(cudaSetDevice(device), operation);
    changed_ = true;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

#endif

constexpr size_t kSharedWithoutAsking = 48 << 10;

// Queues kernel<<<blocks, threads, shared>>>(parameters) on launch.stream; no blocks, no launch.
template <typename Parameters>
void queue(const char* operation, void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, Launch launch,
           const Parameters& parameters) {
  if (blocks <= 0) return;
  if (blocks > 0x7fffffff) throw Error(std::string(operation) + " (cuda): too many blocks");
#ifdef LAYALIGN_EMULATE_CUDA
  (void)launch;
  struct Call {
    void (*kernel)(Parameters);
    const Parameters* parameters;
  } call{kernel, &parameters};
  const auto body = [](const void* raw) {
    const Call* made = static_cast<const Call*>(raw);
    made->kernel(*made->parameters);
  };
  emulation::run((std::string(operation) + " (cuda)").c_str(), body, &call, blocks, threads, shared);
#else
  const DeviceScope scope(launch.device, operation);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > kSharedWithoutAsking) {
    const cudaFuncAttribute limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(function, limit, static_cast<int>(shared)), operation);
  }
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&parameters))};
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  const cudaStream_t stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernel(function, grid, block, arguments, shared, stream), operation);
#endif
}

template <typename Integer>
HOST_DEVICE Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::boolean ? 1 : 2; }

// Whether every row of a tensor starts at a multiple of `bytes`.
inline bool rows_aligned(const Tensor& x, int64_t bytes) {
  if (!aligned(x.data, bytes)) return false;
  for (int i = 0; i + 1 < x.dims; ++i) {
    if (x.size[i] > 1 && x.stride[i] * bytes_of(x.dtype) % bytes != 0) return false;
  }
  return true;
}

// Division by a number that is known on the host: n / divisor for n < 2^31.
struct Divisor {
  uint32_t divisor = 1, factor = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t by) : divisor(by) {
    while (shift < 31 && (1u << shift) < by) ++shift;
    if (by) factor = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }
  DEVICE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32) + n) >> shift;
  }
};

// One number of any floating type, by the run-time value of its type.
DEVICE float load_any(const void* from, int64_t at, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float*>(from)[at];
  if (dtype == DType::float16) return to_float(static_cast<const Half*>(from)[at]);
  return to_float(static_cast<const BFloat*>(from)[at]);
}

}  // namespace layalign::cuda
