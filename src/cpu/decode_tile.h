// The arithmetic of decoding: a tile of a few query rows against a block of keys, all in registers
// and straight from the rows of the cache.
//
// Columns go in pairs of vectors, because that is the cheap way to widen bf16: of kLanes 32-bit
// words, the low halves are the even elements and the high halves the odd ones, a shift and a mask
// instead of two shuffles. Queries and accumulators lie in memory in that order of columns; a dot
// product does not mind, and store_pair() undoes it.
#pragma once

#include <cstring>

#include "attention/split.h"
#include "cpu/convert.h"
#include "cpu/vector_math.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Keys of a block: a row of them is some 4 KB in the usual layout, a page of memory, and the
// block's keys and values together must not need more pages than the first-level TLB holds.
inline constexpr int kDecodeBlock = 16;

// Columns of a pair of vectors.
inline constexpr int kPair = 2 * kLanes;

// ---------------------------------------------------------------------------------------------------
// Pairs of vectors

struct VecPair {
  Vec first, second;
};

FAP_INLINE VecPair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }
FAP_INLINE VecPair load_pair(const Half* p) { return {load_float(p), load_float(p + kLanes)}; }
FAP_INLINE VecPair load_pair(const BFloat16* p) {
  const VecU words = load<VecU>(p);
  return {bits<Vec>(words << 16), bits<Vec>(words & 0xFFFF0000u)};
}

FAP_INLINE void store_pair(float* p, VecPair x) {
  store(p, x.first);
  store(p + kLanes, x.second);
}
FAP_INLINE void store_pair(Half* p, VecPair x) {
  store_float(p, x.first);
  store_float(p + kLanes, x.second);
}
FAP_INLINE void store_pair(BFloat16* p, VecPair x) {
  store(p, bfloat16_bits(x.first) | (bfloat16_bits(x.second) << 16));
}

// Copies n < kPair elements by powers of two, each a copy of a constant size.
template <int kSize = kLanes, typename T>
FAP_INLINE void copy_partial(T* to, const T* from, int n) {
  if (n & kSize) {
    std::memcpy(to, from, kSize * sizeof(T));
    to += kSize;
    from += kSize;
  }
  if constexpr (kSize > 1) copy_partial<kSize / 2>(to, from, n);
}

// The first n < kPair elements, the others 0; memory beyond them is not touched.
template <typename T>
FAP_INLINE VecPair load_pair_partial(const T* p, int n) {
  alignas(64) T buffer[kPair] = {};
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    const __m512i x = _mm512_maskz_loadu_epi16((1u << n) - 1, p);
    std::memcpy(buffer, &x, sizeof(x));
    return load_pair(buffer);
  }
#endif
  copy_partial(buffer, p, n);
  return load_pair(buffer);
}

// The cache lines of a pair of columns.
template <typename T>
FAP_INLINE void prefetch_pair(const T* p) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < kPair; i += 64 / int64_t{sizeof(T)}) __builtin_prefetch(p + i);
}

template <typename T>
FAP_INLINE void store_pair_partial(T* p, VecPair x, int n) {
  T buffer[kPair];
  store_pair(buffer, x);
  copy_partial(p, buffer, n);
}

// ---------------------------------------------------------------------------------------------------
// Scores

// Lanes with bit kBit clear: a[lane] + a[lane ^ kBit]; with it set: the same of b.
template <int kBit>
FAP_INLINE Vec add_halves(Vec a, Vec b) {
  const VecI lane = lane_index();
  const VecI from_b = (lane & kBit) != 0 ? splat(kLanes) : VecI{};
  return __builtin_shuffle(a, b, lane + from_b) + __builtin_shuffle(a, b, (lane ^ kBit) + from_b);
}

// Lane i of the result is the sum of the lanes of v[i]. Destroys v.
template <int kCount = kLanes>
FAP_INLINE Vec sum_each(Vec* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kHalf = kCount / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) v[i] = add_halves<kHalf>(v[i], v[i + kHalf]);
    return sum_each<kHalf>(v);
  }
}

// sums[i][j] += q[i] . keys[j] in one pair of columns, of which n exist when kPartial.
template <int kRows, bool kPartial, typename T>
FAP_INLINE void add_products(const float* q, int64_t q_stride, const T* const* keys,
                             const T* const* next_keys, int64_t column, int n, Vec* sums) {
  constexpr int kKeys = kLanes / kRows;
  VecPair query[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) query[i] = load_pair(q + i * q_stride + column);
#pragma GCC unroll 16
  for (int j = 0; j < kKeys; ++j) {
    const T* p = keys[j] + column;
    prefetch_pair(next_keys[j] + column);
    const VecPair key = kPartial ? load_pair_partial(p, n) : load_pair(p);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      Vec& sum = sums[i * kKeys + j];
      sum = fma(query[i].second, key.second, fma(query[i].first, key.first, sum));
    }
  }
}

// scores[i][j] = q[i] . keys[j] for kRows queries and kLanes / kRows keys.
template <int kRows, typename T>
FAP_INLINE void score_tile(const float* q, int64_t q_stride, const T* const* keys,
                           const T* const* next_keys, int64_t head_dim, float* scores) {
  constexpr int kKeys = kLanes / kRows;
  Vec sums[kLanes] = {};
  int64_t column = 0;
  for (; column + kPair <= head_dim; column += kPair) {
    add_products<kRows, false>(q, q_stride, keys, next_keys, column, kPair, sums);
  }
  if (column < head_dim) {
    const int n = static_cast<int>(head_dim - column);
    add_products<kRows, true>(q, q_stride, keys, next_keys, column, n, sums);
  }
  alignas(64) float tile[kLanes];
  store(tile, sum_each(sums));
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(scores + i * kDecodeBlock, tile + i * kKeys, kKeys * sizeof(float));
  }
}

// ---------------------------------------------------------------------------------------------------
// Softmax

// Everything about one query row that its scores depend on beside q and k.
struct ScoreOptions {
  float softcap;   // 0: off
  float slope;     // ALiBi, 0: off
  int32_t offset;  // of the block's first key from the row's diagonal
  int begin, end;  // visible keys within the block
};

// Turns the scores of a block into exp(score - max), 0 where masked, and takes them into `softmax`.
// Returns what the row's accumulators must be multiplied with before the block is added.
FAP_INLINE float softmax_block(float* scores, const ScoreOptions& options,
                               PartialSoftmax& softmax) {
  constexpr int kVectors = kDecodeBlock / kLanes;
  const bool masked = options.begin > 0 || options.end < kDecodeBlock;
  Vec x[kVectors];
  Vec max_lanes = splat(-kInfinity);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    x[i] = load(scores + i * kLanes);
    const VecI key = lane_index() + i * kLanes;
    if (options.softcap > 0.0f) x[i] = options.softcap * tanh(x[i] / options.softcap);
    if (options.slope != 0.0f) x[i] = x[i] - options.slope * abs(to_float(key + options.offset));
    if (masked) {
      x[i] = select((key >= options.begin) & (key < options.end), x[i], splat(-kInfinity));
    }
    max_lanes = max(x[i], max_lanes);
  }
  const float block_max = reduce_max(max_lanes);
  const float max = block_max > softmax.max ? block_max : softmax.max;
  if (max == -kInfinity) {
    // Nothing to see yet: exp(-inf - -inf) would be NaN.
    for (int i = 0; i < kVectors; ++i) store(scores + i * kLanes, Vec{});
    return 1.0f;
  }
  Vec sum_lanes{};
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const Vec p = exp(x[i] - max);
    sum_lanes += p;
    store(scores + i * kLanes, p);
  }
  const float correction = max == softmax.max ? 1.0f : exp(splat(softmax.max - max))[0];
  softmax.sum = softmax.sum * correction + reduce_add(sum_lanes);
  softmax.max = max;
  return correction;
}

// ---------------------------------------------------------------------------------------------------
// Values

// out[i] += sum over keys of p[i][key] * values[key], on kPairs pairs of columns from `column` on;
// of the last pair n columns exist when kPartial.
template <int kRows, int kPairs, bool kPartial, typename T>
FAP_INLINE void value_tile(const float* p, const T* const* values, const T* const* next_values,
                           int64_t column, int n, int begin, int end, float* out,
                           int64_t out_stride) {
  VecPair sums[kRows][kPairs];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kPairs; ++c) {
      sums[i][c] = load_pair(out + i * out_stride + column + c * kPair);
    }
  }
  for (int key = begin; key < end; ++key) {
    const T* value = values[key] + column;
    const T* next_value = next_values[key] + column;
    Vec weight[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) weight[i] = splat(p[i * kDecodeBlock + key]);
#pragma GCC unroll 4
    for (int c = 0; c < kPairs; ++c) {
      prefetch_pair(next_value + c * kPair);
      const VecPair v =
          kPartial ? load_pair_partial(value + c * kPair, n) : load_pair(value + c * kPair);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        sums[i][c].first = fma(weight[i], v.first, sums[i][c].first);
        sums[i][c].second = fma(weight[i], v.second, sums[i][c].second);
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kPairs; ++c) {
      store_pair(out + i * out_stride + column + c * kPair, sums[i][c]);
    }
  }
}

// All columns, in the widest tiles whose accumulators fit the registers.
template <int kRows, typename T>
FAP_INLINE void add_values(const float* p, const T* const* values, const T* const* next_values,
                           int begin, int end, int64_t head_dim, float* out, int64_t out_stride) {
  constexpr int kAccumulators = kLanes == 16 ? 16 : 8;
  constexpr int kMost = kRows == 1 ? 4 : kAccumulators / 2 / kRows;
  int64_t column = 0;
  for (; column + kMost * kPair <= head_dim; column += kMost * kPair) {
    value_tile<kRows, kMost, false>(p, values, next_values, column, kPair, begin, end, out,
                                    out_stride);
  }
  if constexpr (kMost > 2) {
    if (column + 2 * kPair <= head_dim) {
      value_tile<kRows, 2, false>(p, values, next_values, column, kPair, begin, end, out,
                                  out_stride);
      column += 2 * kPair;
    }
  }
  if constexpr (kMost > 1) {
    if (column + kPair <= head_dim) {
      value_tile<kRows, 1, false>(p, values, next_values, column, kPair, begin, end, out,
                                  out_stride);
      column += kPair;
    }
  }
  if (column < head_dim) {
    const int n = static_cast<int>(head_dim - column);
    value_tile<kRows, 1, true>(p, values, next_values, column, n, begin, end, out, out_stride);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
