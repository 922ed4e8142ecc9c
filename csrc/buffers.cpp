#include "buffers.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

namespace sparsight {
namespace {

struct Buffer {
  void* memory;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::deque<Buffer> free;  // oldest first
  int64_t total = 0;
};

// Never destroyed: tensors may outlive every static at exit.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

}  // namespace

void* allocate_pages(int64_t bytes) {
  constexpr int64_t huge = 2 << 20;
  const int64_t alignment = bytes >= huge ? huge : 4096;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= huge) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

void* take_buffer(int64_t bytes) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    // The youngest of that size: most likely still in a cache.
    for (auto it = p.free.rbegin(); it != p.free.rend(); ++it)
      if (it->bytes == bytes) {
        void* memory = it->memory;
        p.free.erase(std::next(it).base());
        p.total -= bytes;
        return memory;
      }
  }
  return allocate_pages(bytes);
}

void give_back_buffer(void* buffer, int64_t bytes) noexcept {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.free.push_back({buffer, bytes});
  p.total += bytes;
  while (static_cast<int>(p.free.size()) > kPooledBuffers || p.total > kPooledTotal) {
    std::free(p.free.front().memory);
    p.total -= p.free.front().bytes;
    p.free.pop_front();
  }
}

int64_t drop_buffers() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const int64_t dropped = p.total;
  for (const Buffer& buffer : p.free) std::free(buffer.memory);
  p.free.clear();
  p.total = 0;
  return dropped;
}

}  // namespace sparsight
