#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <link.h>
#endif

namespace sparsight {
namespace {

using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  ParallelFn parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int visit(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string file = path.substr(path.find_last_of('/') + 1);
  if (file.rfind("libgomp", 0) != 0 && file.rfind("libiomp", 0) != 0 &&
      file.rfind("libomp", 0) != 0)
    return 0;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return 0;
  if (void* symbol = dlsym(handle, "GOMP_parallel")) {
    auto* runtime = static_cast<Runtime*>(data);
    runtime->parallel = reinterpret_cast<ParallelFn>(symbol);
    runtime->name = file;
    return 1;  // the handle keeps the library loaded for the life of the process
  }
  dlclose(handle);
  return 0;
}
#endif

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime r;
#if defined(__linux__)
    dl_iterate_phdr(visit, &r);
#endif
    return r;
  }();
  return found;
}

struct Region {
  const std::function<void(int)>* body;
  int num_workers;
  std::atomic<int> next{0};
};

// The runtime may hand out fewer threads than asked (nesting, limits): workers are drawn, not
// numbered.
void enter(void* data) {
  auto* region = static_cast<Region*>(data);
  for (int worker; (worker = region->next.fetch_add(1)) < region->num_workers;)
    (*region->body)(worker);
}

}  // namespace

void run_workers(int num_workers, const std::function<void(int)>& body) {
  if (num_workers <= 1) {
    body(0);
    return;
  }
  Region region;
  region.body = &body;
  region.num_workers = num_workers;
  if (runtime().parallel) {
    runtime().parallel(enter, &region, static_cast<unsigned>(num_workers), 0);
    return;
  }
  std::vector<std::thread> threads;
  for (int i = 1; i < num_workers; ++i) threads.emplace_back(enter, &region);
  enter(&region);
  for (auto& thread : threads) thread.join();
}

void parallel_ranges(int num_threads, int64_t count,
                     const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int workers = static_cast<int>(count < num_threads ? count : num_threads);
  run_workers(workers,
              [&](int worker) { body(count * worker / workers, count * (worker + 1) / workers); });
}

const char* threading_runtime() {
  return runtime().name.c_str();
}

}  // namespace sparsight
