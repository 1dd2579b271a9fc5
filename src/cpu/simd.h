// Vectors of float: one type, as wide as the instruction set that this file is compiled for.
//
// Built on the vector extensions of GCC and Clang: +, -, *, / and comparisons are the language's
// own (a multiplication and an addition become one fused operation where there is one), and only
// what the language lacks is written here, with intrinsics where they are better than what the
// compiler finds. A mask is a vector of integers, all bits of a lane set or clear.
//
// Everything lies in the namespace of its instruction set; see kernels.h for why.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 on its own _mm512_undefined_ps()
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FAP_INLINE inline __attribute__((always_inline))
#define FAP_NOINLINE __attribute__((noinline))

namespace flash_attn_plus::cpu::FAP_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));

inline constexpr float kInfinity = __builtin_inff();

FAP_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would change -0
FAP_INLINE VecI splat(int32_t x) { return VecI{} + x; }
FAP_INLINE VecU splat(uint32_t x) { return VecU{} + x; }

// 0, 1, 2, ...
FAP_INLINE VecI lane_index() {
  VecI index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

template <typename To, typename From>
FAP_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FAP_INLINE Vec to_float(VecI x) { return __builtin_convertvector(x, Vec); }

// Memory, of any alignment.
template <typename V = Vec>
FAP_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V>
FAP_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// The first n lanes, the others 0; memory beyond them is not touched. 0 <= n <= kLanes.
FAP_INLINE Vec load_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(p, (__m256i)(lane_index() < n));
#else
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
FAP_INLINE void store_partial(float* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)(lane_index() < n), v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// a * b + c, fused where the instruction set has it.
FAP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// Lanes of a where the mask is set, else of b.
FAP_INLINE Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }

// The second argument where either is NaN: max(x, accumulated) keeps a NaN that came in before, and
// max(accumulated, x) lets one in.
FAP_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
FAP_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

FAP_INLINE Vec abs(Vec x) { return bits<Vec>(bits<VecU>(x) & 0x7FFFFFFFu); }
FAP_INLINE Vec copysign(Vec magnitude, Vec sign) {
  return bits<Vec>((bits<VecU>(magnitude) & 0x7FFFFFFFu) | (bits<VecU>(sign) & 0x80000000u));
}

FAP_INLINE bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  int32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= mask[i];
  return result != 0;
#endif
}

// Reductions over the lanes, by halves: the order is fixed.
template <int kHalf = kLanes / 2>
FAP_INLINE float reduce_add(Vec v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    return reduce_add<kHalf / 2>(v + __builtin_shuffle(v, lane_index() ^ kHalf));
  }
}
template <int kHalf = kLanes / 2>
FAP_INLINE float reduce_max(Vec v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    return reduce_max<kHalf / 2>(max(v, __builtin_shuffle(v, lane_index() ^ kHalf)));
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
