// torch's CPU kernels run on an OpenMP pool. A second pool would compete with it for the cores, so these kernels use
// the same one: the OpenMP runtime that is already loaded is looked up by name, and nothing links to it.
#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
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

// The next call needs scratch of the same size. Memory returned to the system comes back page by page, and a page costs
// a thousand additions or more: in a small call as much as its arithmetic. So scratch is kept for reuse.
namespace {

constexpr size_t kLine = 64;
constexpr size_t kKept = size_t{64} << 20;  // most bytes kept for reuse

struct Block {
  void* memory;
  size_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  size_t bytes = 0;
};

Pool& pool() {
  static Pool* const kept = new Pool;  // never destroyed: threads may still run when the process ends
  return *kept;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kPooled = false;  // the sanitizer guards the ends of each allocation
#else
constexpr bool kPooled = true;
#endif

// A caller that finds the pool locked goes on without it: a process forked while it was locked would wait forever.
void* taken(size_t size) {
  const std::unique_lock<std::mutex> held(pool().mutex, std::try_to_lock);
  if (!kPooled || !held) return nullptr;
  auto& blocks = pool().blocks;
  size_t best = blocks.size();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const bool fits = blocks[i].size >= size && blocks[i].size <= 4 * size;
    if (fits && (best == blocks.size() || blocks[i].size < blocks[best].size)) best = i;
  }
  if (best == blocks.size()) return nullptr;
  void* const memory = blocks[best].memory;
  pool().bytes -= blocks[best].size;
  blocks[best] = blocks.back();
  blocks.pop_back();
  return memory;
}

bool put(void* memory, size_t size) {
  const std::unique_lock<std::mutex> held(pool().mutex, std::try_to_lock);
  if (!kPooled || !held || size > kKept) return false;
  auto& blocks = pool().blocks;
  while (!blocks.empty() && pool().bytes + size > kKept) {  // the oldest block goes
    pool().bytes -= blocks.front().size;
    std::free(blocks.front().memory);
    blocks.erase(blocks.begin());
  }
  blocks.push_back({memory, size});
  pool().bytes += size;
  return true;
}

}  // namespace

void* allocate(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 2 * kLine - 1) / kLine * kLine;  // a line in front holds the size
  void* memory = taken(size);
  if (memory == nullptr) {
    memory = std::aligned_alloc(kLine, size);
    if (memory == nullptr) throw Error("layalign: no memory for " + std::to_string(bytes) + " bytes of scratch");
    *static_cast<size_t*>(memory) = size;
  }
  return static_cast<char*>(memory) + kLine;
}

void release(void* memory) {
  void* const whole = static_cast<char*>(memory) - kLine;
  if (!put(whole, *static_cast<size_t*>(whole))) std::free(whole);
}

}  // namespace layalign::cpu
