// Parallel ranges on the OpenMP runtime that torch has already loaded, whatever its file is called.
//
// Linking an OpenMP runtime of our own would put a second pool beside torch's: both spin after each
// region and fight for the cores. The GOMP_parallel entry point is stable ABI, present in libgomp
// and in libiomp5/libomp; it is looked up in the libraries of this process. Where none is loaded,
// plain std::thread is used per call.
#pragma once
#include <cstdint>
#include <functional>

namespace sparsight {

// Runs body(worker) for worker in [0, num_workers), at once where possible; returns when all are
// done.
void run_workers(int num_workers, const std::function<void(int)>& body);

// Splits [0, count) into contiguous parts, one per worker.
void parallel_ranges(int num_threads, int64_t count,
                     const std::function<void(int64_t, int64_t)>& body);

// "libgomp.so.1", "libiomp5.so", ... or "std::thread".
const char* threading_runtime();

}  // namespace sparsight
