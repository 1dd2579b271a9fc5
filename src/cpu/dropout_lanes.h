// attention/dropout.h on vectors whose lanes are query rows: the same numbers, bit for bit.
//
// A Philox block serves four columns, c, c + 8, c + 16 and c + 24, and two rows, of which a lane
// uses its own.
#pragma once

#include "attention/dropout.h"
#include "cpu/simd.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// The upper and the lower half of the product of each lane with a constant.
FAP_INLINE void multiply_wide(VecU x, uint32_t multiplier, VecU* high, VecU* low) {
  typedef uint64_t VecU64 __attribute__((vector_size(4 * kLanes)));
  const VecU64 pairs = bits<VecU64>(x);
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi64(multiplier);
  const VecU64 even = (VecU64)_mm512_mul_epu32((__m512i)pairs, factor);
  const VecU64 odd = (VecU64)_mm512_mul_epu32((__m512i)(pairs >> 32), factor);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi64x(multiplier);
  const VecU64 even = (VecU64)_mm256_mul_epu32((__m256i)pairs, factor);
  const VecU64 odd = (VecU64)_mm256_mul_epu32((__m256i)(pairs >> 32), factor);
#elif defined(__SSE2__)
  const __m128i factor = _mm_set1_epi64x(multiplier);
  const VecU64 even = (VecU64)_mm_mul_epu32((__m128i)pairs, factor);
  const VecU64 odd = (VecU64)_mm_mul_epu32((__m128i)(pairs >> 32), factor);
#else
  const VecU64 even = (pairs & 0xFFFFFFFFull) * multiplier;
  const VecU64 odd = (pairs >> 32) * multiplier;
#endif
  *high = bits<VecU>((even >> 32) | (odd & 0xFFFFFFFF00000000ull));
  *low = bits<VecU>((even & 0xFFFFFFFFull) | (odd << 32));
}

// The query rows of the lanes.
struct DropoutLanes {
  VecU row_counter;  // dropout_row_counter() of the row
  VecU shift;        // which half of a word is the row's: 0 or 16
  VecU head;         // query head

  static DropoutLanes of(VecI row, VecI head) {
    return {bits<VecU>((row >> 4) * 8 + (row & 7)), bits<VecU>((row & 8) * 2), bits<VecU>(head)};
  }
};

// One Philox block a lane, in place; see attention/dropout.h.
FAP_INLINE void philox(const Dropout& dropout, VecU (&counter)[4]) {
  uint32_t key0 = dropout.key.word[0], key1 = dropout.key.word[1];
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU high0, low0, high1, low1;
    multiply_wide(counter[0], kPhiloxMultiplier0, &high0, &low0);
    multiply_wide(counter[2], kPhiloxMultiplier1, &high1, &low1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// The words of columns c, c + 8, c + 16 and c + 24 with c = 32 * (column_counter / 8) +
// column_counter % 8, column_counter being dropout_column_counter() of any of the four.
FAP_INLINE void dropout_words(const Dropout& dropout, const DropoutLanes& lanes, int64_t batch,
                              uint32_t column_counter, VecU word[4]) {
  VecU counter[4] = {lanes.row_counter, splat(column_counter), lanes.head,
                     splat(static_cast<uint32_t>(batch))};
  philox(dropout, counter);
  for (int i = 0; i < 4; ++i) word[i] = counter[i];
}

// Which lanes keep the column whose word this is, word[(column >> 3) & 3].
FAP_INLINE VecI dropout_keeps(const Dropout& dropout, const DropoutLanes& lanes, VecU word) {
  return bits<VecI>((word >> lanes.shift) & 0xFFFFu) < static_cast<int32_t>(dropout.threshold);
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
