// Counts the large allocations of the process that this is preloaded into.
//
// Compiled by bench/memory.py and named in LD_PRELOAD, so that malloc and its kin of every library
// pass through here: torch's, the kernels' and OpenMP's. glibc only: the real allocator is reached
// by its __libc names, without looking a symbol up, which would allocate.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* old, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
}

namespace {

// Below this, malloc hands out the memory that was freed last; above, it may be fresh at every
// call.
constexpr size_t kLargeBytes = 1 << 20;
std::atomic<int64_t> num_large{0}, large_bytes{0};

void note(size_t bytes) noexcept {
  if (bytes < kLargeBytes) return;
  num_large.fetch_add(1, std::memory_order_relaxed);
  large_bytes.fetch_add(static_cast<int64_t>(bytes), std::memory_order_relaxed);
}

}  // namespace

extern "C" {

int64_t num_large_allocations() {
  return num_large.load();
}
int64_t large_allocation_bytes() {
  return large_bytes.load();
}

void* malloc(size_t bytes) {
  note(bytes);
  return __libc_malloc(bytes);
}

void* calloc(size_t count, size_t bytes) {
  note(count * bytes);
  return __libc_calloc(count, bytes);
}

void* realloc(void* old, size_t bytes) {
  note(bytes);
  return __libc_realloc(old, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
  note(bytes);
  return __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  return memalign(alignment, bytes);
}

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  if (!memory) return ENOMEM;
  *out = memory;
  return 0;
}

}  // extern "C"
