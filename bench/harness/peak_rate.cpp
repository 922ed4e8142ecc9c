// The two roofs, measured: multiply-adds in registers, and additions that only move memory.
//
// Compiled by bench/roofline.py with -O3 -march=native, called through ctypes from one thread each.
#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

// Enough independent chains to hide a latency of four cycles on two ports.
constexpr int kChains = 12;

}  // namespace

// Multiply-adds done by `rounds` rounds; the sum of the accumulators goes to `sink`.
extern "C" int64_t multiply_add(int64_t rounds, float* sink) {
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec{} + float(i);
  Vec a = Vec{} + 0.999f, b = Vec{} + 0.001f;
  for (int64_t r = 0; r < rounds; ++r) {
    // Nothing is known about a and b here, so that no round can be computed beforehand.
    asm volatile("" : "+x"(a), "+x"(b));
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i)
    for (int lane = 0; lane < kLanes; ++lane) total += acc[i][lane];
  *sink = total;
  return rounds * kChains * kLanes;
}

// left += right, `rounds` times; returns the bytes that were read and written.
extern "C" int64_t add_in_place(float* left, const float* right, int64_t count, int64_t rounds) {
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t i = 0; i + kLanes <= count; i += kLanes)
      *(Vec*)(left + i) = *(const Vec*)(left + i) + *(const Vec*)(right + i);
    asm volatile("" ::: "memory");
  }
  return rounds * count * 12;
}
