// Output buffers that are used again.
//
// A map of 32 MB from malloc is fresh memory at every call: thousands of page faults, several times
// the cost of a sparse block. A buffer here goes back to a small free list when its tensor dies,
// and is handed out again for a map of the same size. What the list may hold is bounded in number
// and in bytes, oldest out first, so that a process that sees many sizes stays small.
#pragma once
#include <cstdint>

namespace sparsight {

// Below this, malloc reuses memory by itself.
constexpr int64_t kPooledBytes = 1 << 20;
constexpr int kPooledBuffers = 64;
constexpr int64_t kPooledTotal = int64_t{1} << 30;

// Aligned to a page, in huge pages where it is large; free with std::free. Throws std::bad_alloc.
void* allocate_pages(int64_t bytes);

void* take_buffer(int64_t bytes);  // aligned to 64 bytes; throws std::bad_alloc
void give_back_buffer(void* buffer, int64_t bytes) noexcept;
// Frees what the list holds; returns how many bytes that were.
int64_t drop_buffers();

}  // namespace sparsight
