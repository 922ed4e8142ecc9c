// A small vector facade over float32, one definition per instruction set, and what a map is made
// of: Element, float or bfloat16, read and written as float32 lanes.
//
// A unit is what one packed float of the weights holds: one channel, or in bfloat16 a pair that one
// instruction multiplies and adds (csrc/pack.h).
//
// Included inside namespace sparsight::SPARSIGHT_ISA by isa_*.cpp only, so that no symbol compiled
// with wide instructions can be merged with another file's (the one-definition trap: numpy#25274).
// No std:: templates here or in the bodies that use it.
#if defined(SPARSIGHT_BFLOAT16)
struct Element {
  uint16_t bits;
};
constexpr int kUnit = 2;
#else
typedef float Element;
constexpr int kUnit = 1;
#endif

#if defined(SPARSIGHT_AVX512)

struct Vec {
  __m512 v;
  static constexpr int lanes = 16;
  static inline Vec zero() { return {_mm512_setzero_ps()}; }
  static inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static inline Vec load_part(const float* p, int n) {
    return {_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p)};
  }
  inline void store(float* p) const { _mm512_storeu_ps(p, v); }
  // Past the caches: for maps that no cache holds until they are read again. p is 64-byte aligned.
  inline void stream(float* p) const { _mm512_stream_ps(p, v); }
  inline void store_part(float* p, int n) const {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), v);
  }
  inline float sum() const { return _mm512_reduce_add_ps(v); }
  inline float first() const { return _mm512_cvtss_f32(v); }
#if defined(SPARSIGHT_BFLOAT16)
  static inline Vec widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  inline __m256i narrow() const { return (__m256i)_mm512_cvtneps_pbh(v); }
  static inline Vec load(const Element* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static inline Vec load_part(const Element* p, int n) {
    return widen(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1u), p));
  }
  inline void store(Element* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
  inline void store_part(Element* p, int n) const {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1u), narrow());
  }
#endif
};
// Makes streamed stores visible to whoever is told that they are done.
static inline void stream_fence() {
  _mm_sfence();
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
#if defined(SPARSIGHT_BFLOAT16)
// The pair of channels at p in every lane; the same with a second channel of zero.
static inline Vec unit_at(const Element* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}
static inline Vec half_unit_at(const Element* p) {
  return {_mm512_castsi512_ps(_mm512_set1_epi32(p->bits))};
}
static inline Vec units_at(const Element* p) {
  return {_mm512_loadu_ps(p)};
}
// c + the products of the pairs of a and b, lane by lane.
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
static inline void stream_pair(Element* p, Vec low, Vec high) {
  _mm512_stream_si512((__m512i*)p, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}
#endif
static inline Vec add(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline Vec sub(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline Vec mul(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
// Bit i: whether lane i of a is greater than b's.
static inline uint32_t above(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
// max(a, b) with b returned when a is NaN would hide NaN: the operand order keeps it.
static inline Vec relu(Vec a) {
  return {_mm512_max_ps(_mm512_setzero_ps(), a.v)};
}
// The larger one, NaN where either is.
static inline Vec larger(Vec a, Vec b) {
  return {
      _mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
static inline Vec div(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
// The larger one, b where either is NaN.
static inline Vec greater_or(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
// a - b, 0 where they are equal: infinities too.
static inline Vec distance(Vec a, Vec b) {
  return {_mm512_maskz_sub_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ), a.v, b.v)};
}
// Whether any lane is an infinity; none is NaN.
static inline bool any_infinite(Vec a) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
}
// a where b is above the limit or NaN, else 0.
static inline Vec keep_above(Vec a, Vec b, Vec limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b.v, limit.v, _CMP_NLE_UQ), a.v)};
}
// a 2^n, where n is in the lowest 9 bits of the mantissa of b and the result is a normal number;
// anything of NaN.
static inline Vec times_power_of_two(Vec a, Vec b) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(b.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
}
// The even lanes of the two vectors in a row; the lanes of two vectors in turns, first and last.
static inline Vec even_lanes(Vec a, Vec b) {
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return {_mm512_permutex2var_ps(a.v, at, b.v)};
}
static inline Vec zip_first(Vec a, Vec b) {
  const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return {_mm512_permutex2var_ps(a.v, at, b.v)};
}
static inline Vec zip_last(Vec a, Vec b) {
  const __m512i at =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return {_mm512_permutex2var_ps(a.v, at, b.v)};
}

#elif defined(SPARSIGHT_AVX2)

static const int avx2_mask_table[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

struct Vec {
  __m256 v;
  static constexpr int lanes = 8;
  static inline __m256i mask(int n) {
    return _mm256_loadu_si256((const __m256i*)(avx2_mask_table + 8 - n));
  }
  static inline Vec zero() { return {_mm256_setzero_ps()}; }
  static inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static inline Vec load_part(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  inline void store(float* p) const { _mm256_storeu_ps(p, v); }
  inline void stream(float* p) const { _mm256_stream_ps(p, v); }
  inline void store_part(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  inline float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_shuffle_ps(s, s, 1));
    return _mm_cvtss_f32(s);
  }
  inline float first() const { return _mm256_cvtss_f32(v); }
};
static inline void stream_fence() {
  _mm_sfence();
}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline Vec add(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
static inline Vec sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
static inline Vec mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
static inline uint32_t above(Vec a, Vec b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ));
}
static inline Vec relu(Vec a) {
  return {_mm256_max_ps(_mm256_setzero_ps(), a.v)};
}
static inline Vec larger(Vec a, Vec b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
static inline Vec div(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
static inline Vec greater_or(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
static inline Vec distance(Vec a, Vec b) {
  return {_mm256_and_ps(_mm256_sub_ps(a.v, b.v), _mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ))};
}
static inline bool any_infinite(Vec a) {
  const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
  return _mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ));
}
static inline Vec keep_above(Vec a, Vec b, Vec limit) {
  return {_mm256_and_ps(a.v, _mm256_cmp_ps(b.v, limit.v, _CMP_NLE_UQ))};
}
static inline Vec times_power_of_two(Vec a, Vec b) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(b.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), n))};
}
static inline Vec even_lanes(Vec a, Vec b) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
  return {_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8))};
}
static inline Vec zip_first(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20)};
}
static inline Vec zip_last(Vec a, Vec b) {
  return {_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31)};
}

#else

struct Vec {
  float v;
  static constexpr int lanes = 1;
  static inline Vec zero() { return {0.0f}; }
  static inline Vec set(float x) { return {x}; }
  static inline Vec load(const float* p) { return {*p}; }
  static inline Vec load_part(const float* p, int n) { return {n > 0 ? *p : 0.0f}; }
  inline void store(float* p) const { *p = v; }
  inline void stream(float* p) const { *p = v; }
  inline void store_part(float* p, int n) const {
    if (n > 0) *p = v;
  }
  inline float sum() const { return v; }
  inline float first() const { return v; }
};
static inline void stream_fence() {}
static inline Vec fma(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}
static inline Vec add(Vec a, Vec b) {
  return {a.v + b.v};
}
static inline Vec sub(Vec a, Vec b) {
  return {a.v - b.v};
}
static inline Vec mul(Vec a, Vec b) {
  return {a.v * b.v};
}
static inline uint32_t above(Vec a, Vec b) {
  return a.v > b.v;
}
static inline Vec relu(Vec a) {
  return {a.v < 0.0f ? 0.0f : a.v};
}
static inline Vec larger(Vec a, Vec b) {
  return {a.v != a.v || a.v > b.v ? a.v : b.v};
}
static inline Vec div(Vec a, Vec b) {
  return {a.v / b.v};
}
static inline Vec greater_or(Vec a, Vec b) {
  return {a.v > b.v ? a.v : b.v};
}
static inline Vec distance(Vec a, Vec b) {
  return {a.v == b.v ? 0.0f : a.v - b.v};
}
static inline bool any_infinite(Vec a) {
  return a.v == __builtin_inff() || a.v == -__builtin_inff();
}
static inline Vec keep_above(Vec a, Vec b, Vec limit) {
  return {b.v <= limit.v ? 0.0f : a.v};
}
static inline Vec times_power_of_two(Vec a, Vec b) {
  uint32_t bits, n;
  __builtin_memcpy(&bits, &a.v, sizeof bits);
  __builtin_memcpy(&n, &b.v, sizeof n);
  bits += n << 23;
  Vec result;
  __builtin_memcpy(&result.v, &bits, sizeof bits);
  return result;
}
static inline Vec even_lanes(Vec a, Vec) {
  return a;
}
static inline Vec zip_first(Vec a, Vec) {
  return a;
}
static inline Vec zip_last(Vec, Vec b) {
  return b;
}

#endif

#if !defined(SPARSIGHT_BFLOAT16)
static inline Vec unit_at(const Element* p) {
  return Vec::set(*p);
}
static inline Vec half_unit_at(const Element* p) {
  return Vec::set(*p);
}
static inline Vec units_at(const Element* p) {
  return Vec::load(p);
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return fma(a, b, c);
}
static inline void stream_pair(Element* p, Vec low, Vec high) {
  low.stream(p);
  high.stream(p + Vec::lanes);
}
static inline float to_float(Element x) {
  return x;
}
#else
static inline void stream_pair(float* p, Vec low, Vec high) {
  low.stream(p);
  high.stream(p + Vec::lanes);
}
static inline float to_float(Element x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

// Past the caches, a pair at a time; one vector alone only where it fills a line: not in bfloat16.
template <int VECS, class Out>
static inline void stream_vectors(Out* out, const Vec* x) {
  if constexpr (VECS == 1) {
    if constexpr (sizeof(Out) == sizeof(float))
      x[0].stream(out);
    else
      x[0].store(out);
  } else {
    for (int v = 0; v < VECS; v += 2) stream_pair(out + v * Vec::lanes, x[v], x[v + 1]);
  }
}

// Of 8 words each: the first of `count` sets of bits that it shares one with, or `count`, and its
// bits that are in the `keep` of that set, or none. Sets lie `stride` words apart.
static inline void first_levels(const uint64_t* words, const uint64_t* sets, const uint64_t* keep,
                                int64_t count, int64_t stride, int64_t* level, uint64_t* kept) {
#if defined(SPARSIGHT_AVX512)
  const __m512i word = _mm512_loadu_si512(words);
  __m512i first = _mm512_set1_epi64(count), mask = _mm512_setzero_si512();
  for (int64_t i = count - 1; i >= 0; --i) {
    const __mmask8 shares =
        _mm512_test_epi64_mask(word, _mm512_set1_epi64((long long)sets[i * stride]));
    first = _mm512_mask_mov_epi64(first, shares, _mm512_set1_epi64(i));
    mask = _mm512_mask_mov_epi64(mask, shares, _mm512_set1_epi64((long long)keep[i * stride]));
  }
  _mm512_storeu_si512(level, first);
  _mm512_storeu_si512(kept, _mm512_and_si512(word, mask));
#else
  for (int m = 0; m < 8; ++m) {
    int64_t i = 0;
    while (i < count && !(words[m] & sets[i * stride])) ++i;
    level[m] = i;
    kept[m] = i < count ? words[m] & keep[i * stride] : 0;
  }
#endif
}

// Below this the exponential is 0 here: e^-86.5 is 3e-38, and 2^n stays a normal number.
constexpr float kLeastExponent = -86.5f;
// e^x for x in [kLeastExponent, 0], 0 at its lower end, anything of NaN; within 2 ULP.
//
// e^x = 2^n e^r with |r| <= ln(2) / 2; a number is rounded by adding 1.5 * 2^23, which leaves it in
// the lowest bits. ln(2) is taken off in two parts, of which n times the first is exact. The
// polynomial is the one of degree 5 that is 1 at 0 and whose largest relative error, 9.2e-8, is
// least; one degree less would be 24 ULP.
// N of them step by step, so that their latencies overlap.
template <int N>
static inline __attribute__((always_inline)) void exp_of_negative(const Vec* x, Vec* result) {
  const Vec rounding = Vec::set(12582912.0f);
  Vec shifted[N], r[N], p[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) shifted[i] = fma(x[i], Vec::set(1.44269504088896341f), rounding);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) r[i] = fma(sub(shifted[i], rounding), Vec::set(-0.693359375f), x[i]);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) r[i] = fma(sub(shifted[i], rounding), Vec::set(2.12194440e-4f), r[i]);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    p[i] = fma(r[i], Vec::set(8.290272206e-3f), Vec::set(4.189816117e-2f));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], Vec::set(1.6667638719e-1f));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], Vec::set(4.9999147654e-1f));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], Vec::set(9.9999970198e-1f));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) p[i] = fma(p[i], r[i], Vec::set(1.0f));
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)
    result[i] = keep_above(times_power_of_two(p[i], shifted[i]), x[i], Vec::set(kLeastExponent));
}
static inline Vec exp_of_negative(Vec x) {
  Vec result;
  exp_of_negative<1>(&x, &result);
  return result;
}

static inline const Element* element_row(const void* base, int64_t elements) {
  return (const Element*)base + elements;
}
