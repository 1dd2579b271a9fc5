// Packing as parts of bf16; see pack.h.
#pragma once

#include "cpu/gemm_bf16.h"
#include "cpu/pack_float.h"

#if defined(__AVX512BF16__)

namespace flash_attn_plus::cpu::FAP_ISA {

// Dwords (low half, high half) from the words of the two halves of a vector.
FAP_INLINE VecU interleave_halves(__m512i x) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (VecU)_mm512_permutexvar_epi16(order, x);
}

// Pairs (even, odd) in kNumParts parts: B of a product from two of its rows. The sum of the parts
// is the number, to 24 bits; of NaN and inf the first part is right.
template <int kNumParts>
FAP_INLINE void split_pair(Vec even, Vec odd, VecU (&pair)[kNumParts]) {
#pragma GCC unroll 3
  for (int p = 0; p < kNumParts; ++p) {
    pair[p] = interleave_halves((__m512i)_mm512_cvtne2ps_pbh(odd, even));
    even = even - bits<Vec>(pair[p] << 16);
    odd = odd - bits<Vec>(pair[p] & 0xFFFF0000u);
  }
}

// Stores kLanes numbers as kNumParts parts of bf16: A of a product from a row.
template <int kNumParts>
FAP_INLINE void store_split(BFloat16* dst, int64_t part_stride, Vec x) {
#pragma GCC unroll 3
  for (int p = 0; p < kNumParts; ++p) {
    const __m256i part = (__m256i)_mm512_cvtneps_pbh(x);
    store(dst + p * part_stride, part);
    x = x - bits<Vec>((VecU)_mm512_cvtepu16_epi32(part) << 16);
  }
}

// NaN where a number has no parts: neither has one that rounds to infinity.
FAP_INLINE Vec probe_parts(Vec x, Vec probe) { return probe_finite(x * 1.00390625f, probe); }

// Reads rows for packing and remembers whether all numbers were finite.
template <int kNumParts, typename T>
class RowReader {
 public:
  // Elements [x, x + 16) of a row of d in parts: to dst + part * part_stride.
  FAP_INLINE void copy(const T* row, int64_t x, int64_t d, BFloat16* dst, int64_t part_stride) {
    if constexpr (kRaw) {
      const __m256i v = load_raw(row, x, d);
      store(dst, v);
      see(v);
    } else {
      const Vec v = load_row(row, x, d);
      see(v);
      store_split<kNumParts>(dst, part_stride, v);
    }
  }

  // The same of two rows, as pairs.
  FAP_INLINE void load_pairs(const T* even, const T* odd, int64_t x, int64_t d,
                             VecU (&pair)[kNumParts]) {
    if constexpr (kRaw) {
      pair[0] = interleave_halves(
          _mm512_inserti64x4(_mm512_castsi256_si512(load_raw(even, x, d)), load_raw(odd, x, d), 1));
      see(pair[0]);
    } else {
      const Vec first = load_row(even, x, d), second = load_row(odd, x, d);
      see(first);
      see(second);
      split_pair(first, second, pair);
    }
  }

  bool all_finite() const {
    return !any(probe_ != probe_) && !any((largest_ >> 16) >= 0x7F80u) &&
           !any((largest_ & 0xFFFFu) >= 0x7F80u);
  }

 private:
  static constexpr bool kRaw = kNumParts == 1 && sizeof(T) == sizeof(BFloat16);

  static FAP_INLINE __m256i load_raw(const T* row, int64_t x, int64_t d) {
    if (row == nullptr || x >= d) return __m256i{};
    if (x + kLanes <= d) return load<__m256i>(row + x);
    BFloat16 buffer[kLanes] = {};
    std::memcpy(buffer, row + x, (d - x) * sizeof(BFloat16));
    return load<__m256i>(buffer);
  }

  FAP_INLINE void see(Vec x) { probe_ = probe_parts(x, probe_); }
  FAP_INLINE void see(VecU pair) {
    largest_ = (VecU)_mm512_max_epu16((__m512i)largest_, (__m512i)(pair & 0x7FFF7FFFu));
  }
  FAP_INLINE void see(__m256i v) { see((VecU)_mm512_zextsi256_si512(v)); }

  Vec probe_{};     // NaN where a number was not finite
  VecU largest_{};  // magnitudes, as pairs of words
};

// dst (n, stride) in parts, zero from d on up to `width`, a multiple of 16.
template <int kNumParts, typename T>
FAP_NOINLINE inline bool pack_a_rows(const T* const* rows, int n, int64_t d, int64_t width,
                                     BFloat16* dst, int64_t stride, int64_t part_stride) {
  RowReader<kNumParts, T> reader;
  for (int i = 0; i < n; ++i) {
    for (int64_t x = 0; x < width; x += kLanes) {
      reader.copy(rows[i], x, d, dst + i * stride + x, part_stride);
    }
  }
  return reader.all_finite();
}

// dst (height, stride) in parts, height >= d and `width` >= n being multiples of 16 and 32: zero
// beyond.
template <int kNumParts, typename T>
FAP_NOINLINE inline bool pack_a_columns(const T* const* rows, int n, int64_t d, int64_t height,
                                        int width, BFloat16* dst, int64_t stride,
                                        int64_t part_stride) {
  RowReader<kNumParts, T> reader;
  for (int i = 0; i < width; i += 2 * kLanes) {
    for (int64_t x = 0; x < height; x += kLanes) {
      VecU pairs[kNumParts][kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const int row = i + 2 * j;
        VecU pair[kNumParts];
        reader.load_pairs(row < n ? rows[row] : nullptr, row + 1 < n ? rows[row + 1] : nullptr, x,
                          d, pair);
        for (int p = 0; p < kNumParts; ++p) pairs[p][j] = pair[p];
      }
      for (int p = 0; p < kNumParts; ++p) {
        transpose(pairs[p]);
        BFloat16* block = dst + p * part_stride + x * stride + i;
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(block + j * stride, pairs[p][j]);
      }
    }
  }
  return reader.all_finite();
}

// dst (height / 2, stride) pairs in parts, height >= n being a multiple of 2; zero from d on up to
// `width`, a multiple of 16, and beyond row n. `stride` counts bf16 numbers, 2 * width at least.
template <int kNumParts, typename T>
FAP_NOINLINE inline bool pack_b_rows(const T* const* rows, int n, int64_t d, int height,
                                     int64_t width, BFloat16* dst, int64_t stride,
                                     int64_t part_stride) {
  RowReader<kNumParts, T> reader;
  for (int i = 0; i < height; i += 2) {
    for (int64_t x = 0; x < width; x += kLanes) {
      VecU pair[kNumParts];
      reader.load_pairs(i < n ? rows[i] : nullptr, i + 1 < n ? rows[i + 1] : nullptr, x, d, pair);
      for (int p = 0; p < kNumParts; ++p) {
        store(dst + p * part_stride + (i / 2) * stride + 2 * x, pair[p]);
      }
    }
  }
  return reader.all_finite();
}

// dst (height / 2, stride) pairs in parts, height >= d and `width` >= n being multiples of 32 and
// 16: zero beyond. `stride` counts bf16 numbers, 2 * width at least.
template <int kNumParts, typename T>
FAP_NOINLINE inline bool pack_b_columns(const T* const* rows, int n, int64_t d, int64_t height,
                                        int width, BFloat16* dst, int64_t stride,
                                        int64_t part_stride) {
  RowReader<kNumParts, T> reader;
  for (int i = 0; i < width; i += kLanes) {
    for (int64_t x = 0; x < height; x += 2 * kLanes) {
      BFloat16 numbers[kNumParts][kLanes][2 * kLanes];
      for (int j = 0; j < kLanes; ++j) {
        const T* row = i + j < n ? rows[i + j] : nullptr;
        for (int64_t half = 0; half < 2 * kLanes; half += kLanes) {
          reader.copy(row, x + half, d, numbers[0][j] + half, 2 * kLanes * kLanes);
        }
      }
      for (int p = 0; p < kNumParts; ++p) {
        VecU pairs[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) pairs[j] = load<VecU>(numbers[p][j]);
        transpose(pairs);
        BFloat16* block = dst + p * part_stride + x / 2 * stride + 2 * i;
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(block + j * stride, pairs[j]);
      }
    }
  }
  return reader.all_finite();
}

}  // namespace flash_attn_plus::cpu::FAP_ISA

#endif  // __AVX512BF16__
