// torch's CPU kernels run on an OpenMP pool. A second pool would compete with it for the cores, so these kernels use
// the same one: the OpenMP runtime that is already loaded is looked up by name, and nothing links to it.
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../layalign.h"

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace layalign::cpu {
namespace {

struct Job {
  int64_t count;
  void (*task)(void*, int64_t, int);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
};

void work(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  const int worker = job.workers.fetch_add(1, std::memory_order_relaxed);
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.task(job.context, i, worker);
}

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the process's OpenMP runtime; LLVM's has it too. Null where there is none.
Fork openmp() {
#if defined(__linux__) || defined(__APPLE__)
  static const Fork found = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    for (const char* name : {"libgomp.so.1", "libiomp5.so", "libomp.so"}) {
      if (symbol != nullptr) break;
      if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) symbol = dlsym(library, "GOMP_parallel");
    }
    return reinterpret_cast<Fork>(symbol);
  }();
  return found;
#else
  return nullptr;
#endif
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*task)(void*, int64_t, int), void* context) {
  const int useful = static_cast<int>(count < threads ? count : threads);
  if (useful <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  Job job{count, task, context};
  if (Fork fork = openmp()) return fork(work, &job, static_cast<unsigned>(useful), 0);
  // No OpenMP in the process (torch built without it): threads for the length of this call.
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(useful));
  try {
    for (int i = 1; i < useful; ++i) helpers.emplace_back(work, &job);
  } catch (const std::system_error&) {
    // The system refused another thread; the ones that were started do the work.
  }
  work(&job);
  for (std::thread& helper : helpers) helper.join();
}

int worth_threads(int threads, double microseconds) { return microseconds < 40 || threads < 1 ? 1 : threads; }

void* allocate(int64_t bytes) {
  constexpr size_t kLine = 64;
  const size_t lines = (static_cast<size_t>(bytes) + kLine - 1) / kLine;
  void* const memory = std::aligned_alloc(kLine, kLine * (lines > 0 ? lines : 1));
  if (memory == nullptr) throw Error("layalign: no memory for " + std::to_string(bytes) + " bytes of scratch");
  return memory;
}

}  // namespace layalign::cpu
