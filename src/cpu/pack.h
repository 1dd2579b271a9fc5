// Packing: rows of q, k, v or of their gradients, which lie anywhere in memory and have any type,
// into the dense blocks that the products read; and the way back for results.
//
// Rows are given as an array of pointers, so that pages, strides and packed query groups are all
// the same here. A null pointer is a row of zeros; what is padded is 0 and is never read from
// memory.
//
//   pack_rows            float   dst[i][x]             = row i
//   pack_columns         float   dst[x][i]             = row i
//   pack_a_rows          bf16    dst[i][x]             A of a product, rows
//   pack_a_columns       bf16    dst[x][i]             A of a product, transposed
//   pack_b_rows          bf16    dst[i / 2][x][i % 2]  B of a product: k runs over rows
//   pack_b_columns       bf16    dst[x / 2][i][x % 2]  B of a product, transposed: k runs along
//   rows unpack_columns       T       row i                 = src[x][i]
//
// The bf16 forms write kNumParts parts, one after another. All that read return whether every
// number was finite: the lower parts of inf and NaN are 0, so sums of products are right without
// them only.
#pragma once

#include <utility>

#include "cpu/convert.h"
#include "cpu/gemm_bf16.h"

namespace flash_attn_plus::cpu::FAP_ISA {

template <int kStep, bool kUpper, typename V, size_t... kIndex>
FAP_INLINE V merge_lanes(V a, V b, std::index_sequence<kIndex...>) {
  constexpr int n = kLanes, s = kStep;
  if constexpr (kUpper) {
    return __builtin_shufflevector(a, b,
                                   ((int(kIndex) & s) ? n + int(kIndex) : int(kIndex) + s)...);
  } else {
    return __builtin_shufflevector(a, b,
                                   ((int(kIndex) & s) ? n + int(kIndex) - s : int(kIndex))...);
  }
}

// Exchanges the off-diagonal halves of blocks of 2 * kStep rows.
template <int kStep, typename V>
FAP_INLINE void transpose_step(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const V a = v[i], b = v[i + kStep];
    v[i] = merge_lanes<kStep, false>(a, b, std::make_index_sequence<kLanes>());
    v[i + kStep] = merge_lanes<kStep, true>(a, b, std::make_index_sequence<kLanes>());
  }
}

// A square of kLanes x kLanes.
template <typename V>
FAP_INLINE void transpose(V (&v)[kLanes]) {
  if constexpr (kLanes > 8) transpose_step<kLanes / 2>(v);
  if constexpr (kLanes > 4) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// NaN in a lane that has seen inf or NaN, else 0.
FAP_INLINE Vec probe_finite(Vec x, Vec probe) { return fma(x, Vec{}, probe); }
FAP_INLINE bool all_finite(Vec probe) { return !any(probe != probe); }

// Elements [x, x + kLanes) of a row of d.
template <typename T>
FAP_INLINE Vec load_row(const T* row, int64_t x, int64_t d) {
  if (row == nullptr || x >= d) return Vec{};
  return x + kLanes <= d ? load_float(row + x)
                         : load_float_partial(row + x, static_cast<int>(d - x));
}

// dst (n, stride), zero from d on up to `width`, a multiple of kLanes.
template <typename T>
inline bool pack_rows(const T* const* rows, int n, int64_t d, int64_t width, float* dst,
                      int64_t stride) {
  Vec probe{};
  for (int i = 0; i < n; ++i) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Vec v = load_row(rows[i], x, d);
      probe = probe_finite(v, probe);
      store(dst + i * stride + x, v);
    }
  }
  return all_finite(probe);
}

// dst (d, stride), zero from column n on up to `width`, a multiple of kLanes.
template <typename T>
inline bool pack_columns(const T* const* rows, int n, int64_t d, int width, float* dst,
                         int64_t stride) {
  Vec probe{};
  for (int i = 0; i < width; i += kLanes) {
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        v[j] = i + j < n ? load_row(rows[i + j], x, d) : Vec{};
        probe = probe_finite(v[j], probe);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (x + j < d) store(dst + (x + j) * stride + i, v[j]);
      }
    }
  }
  return all_finite(probe);
}

// Row i of the result is column i of src (d, stride), i < n; null rows are skipped.
template <typename T>
inline void unpack_columns(const float* src, int64_t stride, int n, int64_t d, T* const* rows) {
  for (int i = 0; i < n; i += kLanes) {
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = x + j < d ? load(src + (x + j) * stride + i) : Vec{};
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (i + j >= n || rows[i + j] == nullptr) continue;
        T* row = rows[i + j] + x;
        if (x + kLanes <= d) {
          store_float(row, v[j]);
        } else {
          store_float_partial(row, v[j], static_cast<int>(d - x));
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)

// The 16 upper bits of x, rounded to nearest even, in place; NaN stays NaN.
FAP_INLINE VecU round_to_bfloat16(Vec x) {
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(x);
  return (VecU)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}

// Pairs of bf16, `even` in the lower halves, from numbers that bf16 holds exactly.
FAP_INLINE VecU pair_of(VecU even, VecU odd) {
  return (VecU)_mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32((__m512i)even, 16),
                                       (__m512i)odd);
}

// Splits x: the sum of the parts is x (kNumParts as in kParts of its type), to 24 bits.
template <int kNumParts>
FAP_INLINE void split(Vec x, VecU (&part)[kNumParts]) {
#pragma GCC unroll 3
  for (int p = 0; p < kNumParts; ++p) {
    part[p] = round_to_bfloat16(x);
    if (p + 1 < kNumParts) {
      const Vec rest = x - bits<Vec>(part[p]);
      x = select(rest == rest, rest, Vec{});
    }
  }
}

// Pairs (even, odd) in kNumParts parts: B of a product from two of its rows.
template <int kNumParts>
FAP_INLINE void split_pair(Vec even, Vec odd, VecU (&pair)[kNumParts]) {
  VecU even_part[kNumParts], odd_part[kNumParts];
  split(even, even_part);
  split(odd, odd_part);
#pragma GCC unroll 3
  for (int p = 0; p < kNumParts; ++p) pair[p] = pair_of(even_part[p], odd_part[p]);
}

// Stores kLanes numbers as kNumParts parts of bf16: A of a product from a row.
template <int kNumParts>
FAP_INLINE void store_split(BFloat16* dst, int64_t part_stride, Vec x) {
  VecU part[kNumParts];
  split(x, part);
#pragma GCC unroll 3
  for (int p = 0; p < kNumParts; ++p) {
    store(dst + p * part_stride, __builtin_convertvector(part[p] >> 16, VecU16));
  }
}

// dst (n, stride) in parts, zero from d on up to `width`, a multiple of 16.
template <int kNumParts, typename T>
inline bool pack_a_rows(const T* const* rows, int n, int64_t d, int64_t width, BFloat16* dst,
                        int64_t stride, int64_t part_stride) {
  Vec probe{};
  for (int i = 0; i < n; ++i) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Vec v = load_row(rows[i], x, d);
      probe = probe_finite(v, probe);
      store_split<kNumParts>(dst + i * stride + x, part_stride, v);
    }
  }
  return all_finite(probe);
}

// dst (height, stride) in parts, height >= d and `width` >= n being multiples of 16 and 32: zero
// beyond.
template <int kNumParts, typename T>
inline bool pack_a_columns(const T* const* rows, int n, int64_t d, int64_t height, int width,
                           BFloat16* dst, int64_t stride, int64_t part_stride) {
  Vec probe{};
  for (int i = 0; i < width; i += 2 * kLanes) {
    for (int64_t x = 0; x < height; x += kLanes) {
      VecU pairs[kNumParts][kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const int row = i + 2 * j;
        const Vec even = row < n ? load_row(rows[row], x, d) : Vec{};
        const Vec odd = row + 1 < n ? load_row(rows[row + 1], x, d) : Vec{};
        probe = probe_finite(odd, probe_finite(even, probe));
        VecU pair[kNumParts];
        split_pair(even, odd, pair);
        for (int p = 0; p < kNumParts; ++p) pairs[p][j] = pair[p];
      }
      for (int p = 0; p < kNumParts; ++p) {
        transpose(pairs[p]);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          store(dst + p * part_stride + (x + j) * stride + i, pairs[p][j]);
        }
      }
    }
  }
  return all_finite(probe);
}

// dst (height / 2, stride) pairs in parts, height >= n being a multiple of 2; zero from d on up to
// `width`, a multiple of 16, and beyond row n. `stride` counts bf16 numbers, 2 * width at least.
template <int kNumParts, typename T>
inline bool pack_b_rows(const T* const* rows, int n, int64_t d, int height, int64_t width,
                        BFloat16* dst, int64_t stride, int64_t part_stride) {
  Vec probe{};
  for (int i = 0; i < height; i += 2) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Vec even = i < n ? load_row(rows[i], x, d) : Vec{};
      const Vec odd = i + 1 < n ? load_row(rows[i + 1], x, d) : Vec{};
      probe = probe_finite(odd, probe_finite(even, probe));
      VecU pair[kNumParts];
      split_pair(even, odd, pair);
      for (int p = 0; p < kNumParts; ++p) {
        store(dst + p * part_stride + (i / 2) * stride + 2 * x, pair[p]);
      }
    }
  }
  return all_finite(probe);
}

// dst (height / 2, stride) pairs in parts, height >= d and `width` >= n being multiples of 32 and
// 16: zero beyond. `stride` counts bf16 numbers, 2 * width at least.
template <int kNumParts, typename T>
inline bool pack_b_columns(const T* const* rows, int n, int64_t d, int64_t height, int width,
                           BFloat16* dst, int64_t stride, int64_t part_stride) {
  Vec probe{};
  for (int i = 0; i < width; i += kLanes) {
    for (int64_t x = 0; x < height; x += 2 * kLanes) {
      VecU pairs[kNumParts][kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        BFloat16 numbers[kNumParts][2 * kLanes];
        for (int64_t half = 0; half < 2; ++half) {
          const Vec v = i + j < n ? load_row(rows[i + j], x + half * kLanes, d) : Vec{};
          probe = probe_finite(v, probe);
          store_split<kNumParts>(numbers[0] + half * kLanes, 2 * kLanes, v);
        }
        for (int p = 0; p < kNumParts; ++p) pairs[p][j] = load<VecU>(numbers[p]);
      }
      for (int p = 0; p < kNumParts; ++p) {
        transpose(pairs[p]);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
          store(dst + p * part_stride + (x / 2 + j) * stride + 2 * i, pairs[p][j]);
        }
      }
    }
  }
  return all_finite(probe);
}

#endif  // __AVX512BF16__

}  // namespace flash_attn_plus::cpu::FAP_ISA
