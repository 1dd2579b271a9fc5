// Elementary functions on vectors. Errors are those found by cpu_math_test.cpp.
#pragma once

#include "cpu/simd.h"

namespace flash_attn_plus::cpu::FAP_ISA {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

// Below this exponent 2^x is taken as 0, so that no subnormal number, slow on many CPUs, arises.
inline constexpr float kMinExponent = -125.0f;

// The integer nearest to x, |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
FAP_INLINE Vec round_small(Vec x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Vec shifted = x + 0x1.8p23f;
  asm("" : "+m"(shifted));  // the compiler may not cancel the two additions
  return shifted - 0x1.8p23f;
#endif
}

// fraction * 2^n for an integral n, and 0 where x < kMinExponent, x being the exponent before
// rounding. NaN stays.
FAP_INLINE Vec scale_by_power_of_two(Vec fraction, Vec n, Vec x) {
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask(x, splat(kMinExponent), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, fraction, n);
#else
  // 2^(n-1) is a normal number for all n that remain, 2^n is not for n = 128.
  const Vec clamped = min(max(n, splat(-200.0f)), splat(128.0f));
  const VecI exponent = __builtin_convertvector(clamped, VecI);
  const Vec power = bits<Vec>((exponent + 126) << 23);
  const Vec result = (fraction + fraction) * power;
  return select(x < kMinExponent, Vec{}, select(x > 128.0f, splat(kInfinity), result));
#endif
}

// 2^r for |r| <= 1/2, kDegree being that of the polynomial (minimax in the relative error, 1 at 0):
// 5: 9e-8, 4: 3e-6, 3: 1e-4, which is a twentieth of bf16's rounding.
template <int kDegree>
FAP_INLINE Vec exp2_fraction(Vec r) {
  Vec p;
  if constexpr (kDegree == 5) {
    p = fma(splat(0.001326472731307149f), r, splat(0.009671512991189957f));
    p = fma(p, r, splat(0.05550733581185341f));
    p = fma(p, r, splat(0.24022242426872253f));
    p = fma(p, r, splat(0.6931470036506653f));
  } else if constexpr (kDegree == 4) {
    p = fma(splat(0.009582852944731712f), r, splat(0.055906426161527634f));
    p = fma(p, r, splat(0.24024099111557007f));
    p = fma(p, r, splat(0.6931241750717163f));
  } else {
    static_assert(kDegree == 3);
    p = fma(splat(0.05500892922282219f), r, splat(0.24221095442771912f));
    p = fma(p, r, splat(0.6932829022407532f));
  }
  return fma(p, r, splat(1.0f));
}

// 2^x for x < inf. 2^-inf = 0, NaN stays. With degree 5 the error is below 2 units in the last
// place.
template <int kDegree = 5>
FAP_INLINE Vec exp2(Vec x) {
  const Vec n = round_small(x);
  return scale_by_power_of_two(exp2_fraction<kDegree>(x - n), n, x);
}

// e^x. e^-inf = 0, NaN stays. Error below 2 units in the last place: x - n ln 2 is formed with ln 2
// in two parts, of which the first times n is exact.
FAP_INLINE Vec exp(Vec x) {
  const Vec exponent = min(splat(200.0f), x * kLog2E);
  const Vec n = round_small(exponent);
  const Vec r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), min(splat(140.0f), x)));
  return scale_by_power_of_two(exp2_fraction<5>(r * kLog2E), n, exponent);
}

// ln x of a number that is not subnormal: log(0) = -inf, log(inf) = inf, NaN below 0. With x = f
// 2^n and f in [sqrt(1/2), sqrt(2)), ln x = ln f + n ln 2. Error below 2 units in the last place.
FAP_INLINE Vec log(Vec x) {
  const VecI u = bits<VecI>(x);
  const VecI n = (u - 0x3F3504F3) >> 23;  // the bits of sqrt(1/2)
  const Vec z = bits<Vec>(u - (n << 23)) - 1.0f;
  Vec p = fma(splat(-0.07634496688842773f), z, splat(0.1276157647371292f));
  p = fma(p, z, splat(-0.13160182535648346f));
  p = fma(p, z, splat(0.14201757311820984f));
  p = fma(p, z, splat(-0.16623356938362122f));
  p = fma(p, z, splat(0.20001226663589478f));
  p = fma(p, z, splat(-0.2500081956386566f));
  p = fma(p, z, splat(0.3333333134651184f));
  const Vec tail = fma(p * z, z * z, z * z * -0.5f) + z;
  const Vec result = fma(to_float(n), splat(kLn2), tail);
  const Vec special =
      select(x == 0.0f, splat(-kInfinity), select(x < 0.0f, splat(__builtin_nanf("")), x));
  return select((x > 0.0f) & (x < kInfinity), result, special);
}

// An odd polynomial near 0, where 1 - e^-2x would cancel, and (1 - e^-2|x|) / (1 + e^-2|x|) beyond.
FAP_INLINE Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = fma(splat(-0.005717045161873102f), z, splat(0.02065058797597885f));
  p = fma(p, z, splat(-0.05374349653720856f));
  p = fma(p, z, splat(0.13331490755081177f));
  p = fma(p, z, splat(-0.3333328366279602f));
  const Vec near = fma(p * z, x, x);
  const Vec e = exp(abs(x) * -2.0f);
  const Vec far = copysign((1.0f - e) / (1.0f + e), x);
  return select(abs(x) < 0.625f, near, far);
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
