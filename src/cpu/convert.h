// Numbers of two bytes: loads widen to float, stores round to nearest even and keep NaN.
//
// Half and BFloat16 are bit patterns without arithmetic. Everything is exact or correctly rounded
// and the same on every instruction set, subnormal numbers included.
#pragma once

#include "cpu/simd.h"

namespace flash_attn_plus::cpu::FAP_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

// In the low 16 bits of each lane. Rounding adds just under half a unit, and one more when the kept
// part is odd; a NaN keeps its upper bits and becomes quiet.
FAP_INLINE VecU bfloat16_bits(Vec x) {
  const VecU u = bits<VecU>(x);
  const VecU rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return x == x ? rounded : (u >> 16) | 0x40u;
}

// float of fp16 bits in the low 16 bits of each lane.
FAP_INLINE Vec half_to_float(VecU h) {
  // The exponent is rebased by a multiplication, which also normalises subnormal numbers.
  const VecU magnitude = (h & 0x7FFFu) << 13;
  const Vec rebased = bits<Vec>(magnitude) * 0x1p112f;
  const VecU special =
      (magnitude | 0x7F800000u) | ((magnitude & 0x7FFFFFu) ? VecU{} + 0x400000u : VecU{});
  const VecU value = (h & 0x7C00u) == 0x7C00u ? special : bits<VecU>(rebased);
  return bits<Vec>(value | ((h & 0x8000u) << 16));
}

FAP_INLINE VecU half_bits(Vec x) {
  const VecU u = bits<VecU>(x);
  const VecU sign = (u >> 16) & 0x8000u;
  const VecU magnitude = u & 0x7FFFFFFFu;
  // Normal numbers: rebase the exponent and round in integers; a carry into it is right.
  const VecU normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal numbers: adding 1/2 aligns the binary point, and the addition rounds.
  const VecU subnormal = bits<VecU>(bits<Vec>(magnitude) + 0.5f) - 0x3F000000u;
  VecU result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x47800000u ? VecU{} + 0x7C00u : result;  // 65536 and more
  result = magnitude > 0x7F800000u ? ((magnitude >> 13) & 0x3FFu) | 0x7E00u : result;
  return result | sign;
}

// kLanes elements.
FAP_INLINE Vec load_float(const float* p) { return load(p); }
FAP_INLINE Vec load_float(const BFloat16* p) {
  return bits<Vec>(__builtin_convertvector(load<VecU16>(p), VecU) << 16);
}
FAP_INLINE Vec load_float(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return half_to_float(__builtin_convertvector(load<VecU16>(p), VecU));
#endif
}

FAP_INLINE void store_float(float* p, Vec x) { store(p, x); }
FAP_INLINE void store_float(BFloat16* p, Vec x) {
  store(p, __builtin_convertvector(bfloat16_bits(x), VecU16));
}
FAP_INLINE void store_float(Half* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  store(p, __builtin_convertvector(half_bits(x), VecU16));
#endif
}

// The first n lanes, the others 0; memory beyond them is not touched.
template <typename T>
FAP_INLINE Vec load_float_partial(const T* p, int n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return load_partial(p, n);
  } else {
    T buffer[kLanes] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load_float(buffer);
  }
}
template <typename T>
FAP_INLINE void store_float_partial(T* p, Vec x, int n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    store_partial(p, x, n);
  } else {
    T buffer[kLanes];
    store_float(buffer, x);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
