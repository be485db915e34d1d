// The public functions: the kernels of the widest instruction set that was compiled in and that this machine has.
//
// LAYALIGN_HAVE_AVX512, _AVX2, _NEON and _BASELINE say what was compiled in. The environment variable LAYALIGN_CPU_ISA
// overrides the choice. This file itself is compiled for the baseline.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../layalign.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define LAYALIGN_DECLARE(isa)                                                        \
  namespace isa {                                                                    \
  void layer_mix_forward(const LayerMixForward& call, int threads);                  \
  void layer_mix_backward(const LayerMixBackward& call, int threads);                \
  int64_t packed_width();                                                            \
  bool pack_weight(const PackWeight& call, int threads);                             \
  void layer_projection_forward(const LayerProjectionForward& call, int threads);    \
  void layer_projection_backward(const LayerProjectionBackward& call, int threads);  \
  void batched_linear(const BatchedLinear& call, int threads);                       \
  void gated_cross_attention_forward(const AttentionForward& call, int threads);     \
  void gated_cross_attention_decode(const AttentionDecode& call, int threads);       \
  void gated_cross_attention_backward(const AttentionBackward& call, int threads);   \
  }
#define LAYALIGN_TABLE(isa, works)                                                                            \
  Kernels{#isa, works, isa::layer_mix_forward, isa::layer_mix_backward, isa::packed_width, isa::pack_weight,  \
          isa::layer_projection_forward, isa::layer_projection_backward, isa::batched_linear,                 \
          isa::gated_cross_attention_forward, isa::gated_cross_attention_decode,                              \
          isa::gated_cross_attention_backward}

namespace layalign::cpu {

#ifdef LAYALIGN_HAVE_AVX512
LAYALIGN_DECLARE(avx512)
#endif
#ifdef LAYALIGN_HAVE_AVX2
LAYALIGN_DECLARE(avx2)
#endif
#ifdef LAYALIGN_HAVE_NEON
LAYALIGN_DECLARE(neon)
#endif
#ifdef LAYALIGN_HAVE_BASELINE
LAYALIGN_DECLARE(baseline)
#endif

namespace {

struct Kernels {
  const char* name;
  bool (*works)();  // on this machine
  void (*layer_mix_forward)(const LayerMixForward&, int);
  void (*layer_mix_backward)(const LayerMixBackward&, int);
  int64_t (*packed_width)();
  bool (*pack_weight)(const PackWeight&, int);
  void (*layer_projection_forward)(const LayerProjectionForward&, int);
  void (*layer_projection_backward)(const LayerProjectionBackward&, int);
  void (*batched_linear)(const BatchedLinear&, int);
  void (*gated_cross_attention_forward)(const AttentionForward&, int);
  void (*gated_cross_attention_decode)(const AttentionDecode&, int);
  void (*gated_cross_attention_backward)(const AttentionBackward&, int);
};

[[maybe_unused]] bool always() { return true; }

#if defined(__x86_64__)
// Some compilers' __builtin_cpu_supports do not know f16c.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
[[maybe_unused]] bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && has_f16c();
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// The widest first.
const Kernels kTables[] = {
#ifdef LAYALIGN_HAVE_AVX512
    LAYALIGN_TABLE(avx512, has_avx512),
#endif
#ifdef LAYALIGN_HAVE_AVX2
    LAYALIGN_TABLE(avx2, has_avx2),
#endif
#ifdef LAYALIGN_HAVE_NEON
    LAYALIGN_TABLE(neon, always),
#endif
#ifdef LAYALIGN_HAVE_BASELINE
    LAYALIGN_TABLE(baseline, always),
#endif
};

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* named(const char* name) {
  for (const Kernels& table : kTables) {
    if (std::strcmp(table.name, name) == 0 && table.works()) return &table;
  }
  return nullptr;
}

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  const char* wanted = std::getenv("LAYALIGN_CPU_ISA");
  std::string usable;
  for (const Kernels& table : kTables) {
    if (!table.works()) continue;
    if (found == nullptr) found = &table;
    usable += std::string(usable.empty() ? "" : ", ") + table.name;
  }
  if (wanted != nullptr && *wanted != '\0') {
    found = named(wanted);
    if (found == nullptr) {
      throw Error("layalign: LAYALIGN_CPU_ISA is '" + std::string(wanted) + "'; this build and machine have " + usable);
    }
  }
  if (found == nullptr) throw Error("layalign: no CPU kernels were compiled for this machine");
  chosen.store(found, std::memory_order_release);
  return *found;
}

}  // namespace

void layer_mix_forward(const LayerMixForward& call, int threads) { kernels().layer_mix_forward(call, threads); }
void layer_mix_backward(const LayerMixBackward& call, int threads) { kernels().layer_mix_backward(call, threads); }
int64_t layer_mix_workspace(int64_t, int64_t, int64_t, int64_t) { return 0; }  // they allocate scratch
int64_t packed_width() { return kernels().packed_width(); }
bool pack_weight(const PackWeight& call, int threads) { return kernels().pack_weight(call, threads); }
void layer_projection_forward(const LayerProjectionForward& call, int threads) {
  kernels().layer_projection_forward(call, threads);
}
void layer_projection_backward(const LayerProjectionBackward& call, int threads) {
  kernels().layer_projection_backward(call, threads);
}
void batched_linear(const BatchedLinear& call, int threads) { kernels().batched_linear(call, threads); }
void gated_cross_attention_forward(const AttentionForward& call, int threads) {
  kernels().gated_cross_attention_forward(call, threads);
}
void gated_cross_attention_decode(const AttentionDecode& call, int threads) {
  kernels().gated_cross_attention_decode(call, threads);
}
void gated_cross_attention_backward(const AttentionBackward& call, int threads) {
  kernels().gated_cross_attention_backward(call, threads);
}

const char* instruction_set() { return kernels().name; }

bool use_instruction_set(const char* name) {
  const Kernels* found = named(name);
  if (found != nullptr) chosen.store(found, std::memory_order_release);
  return found != nullptr;
}

}  // namespace layalign::cpu
