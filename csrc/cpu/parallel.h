// Work shared among the threads that torch already has, and memory for it.
#pragma once

#include <cstdint>

namespace layalign::cpu {

// Calls task(context, i, worker) for i in 0 .. count-1, each once, on at most `threads` threads, and returns when all
// are done. Calls that run at the same time have different workers, in 0 .. threads-1. The tasks must not throw.
void parallel_for(int64_t count, int threads, void (*task)(void*, int64_t, int), void* context);

// The same for a lambda: `parallel(count, threads, [&](int64_t i, int worker) { ... })`.
template <typename Function>
static inline void parallel(int64_t count, int threads, const Function& function) {
  parallel_for(
      count, threads,
      [](void* context, int64_t i, int worker) { (*static_cast<const Function*>(context))(i, worker); },
      const_cast<Function*>(&function));
}

// How many of `threads` to use: one where the work takes less time than waking the others.
int worth_threads(int threads, double microseconds);

// Memory aligned to 64 bytes, for std::free; throws layalign::Error where there is none.
void* allocate(int64_t bytes);

}  // namespace layalign::cpu
