// The online softmax of the forward kernel, on transposed scores: a row is a key, the lanes are
// query rows, so that maxima, sums and masks are vertical and nothing is ever reduced across lanes.
//
// Maxima are kept in units of log2: p = 2^(factor * score - max), one multiply-add before the
// exponential. The maximum in use follows the true one only when that has grown by more than
// kMaxSlack: until then p is at most 2^kMaxSlack, which float, and the sums, hold as well as 1, and
// the output needs no rescaling.
#pragma once

#include "attention/params.h"
#include "cpu/dropout_lanes.h"
#include "cpu/vector_math.h"

namespace flash_attn_plus::cpu::FAP_ISA {

inline constexpr float kMaxSlack = 8.0f;

// What a query row needs beside its numbers, for kLanes rows.
struct LaneRows {
  VecI first, last;  // keys [first, last) of the block are visible
  Vec diagonal;      // key of the block that ALiBi's distance counts from
  Vec alibi_slope;
  DropoutLanes dropout;
};

// How a raw product becomes a score, the same for all rows.
struct ScoreTransform {
  float scale = 1.0f;    // softmax_scale
  float softcap = 0.0f;  // 0: off
  bool alibi = false;

  // A positive scale alone is left to the exponential.
  bool trivial() const { return softcap == 0.0f && !alibi && scale > 0.0f; }
  // Units of log2 per unit of a transformed score.
  float factor() const { return trivial() ? scale * kLog2E : kLog2E; }
};

// Transforms and masks rows [begin, end) of one vector of columns, in place.
FAP_INLINE void transform_scores(float* scores, int64_t stride, int begin, int end,
                                 const ScoreTransform& transform, const LaneRows& rows,
                                 bool masked) {
  const bool trivial = transform.trivial();
  const float inverse_softcap = transform.softcap > 0.0f ? 1.0f / transform.softcap : 0.0f;
  for (int key = begin; key < end; ++key) {
    float* p = scores + key * stride;
    Vec s = load(p);
    if (!trivial) {
      s = s * transform.scale;
      if (transform.softcap > 0.0f) s = tanh(s * inverse_softcap) * transform.softcap;
      if (transform.alibi) s = s - rows.alibi_slope * abs(rows.diagonal - static_cast<float>(key));
    }
    if (masked) s = select((key >= rows.first) & (key < rows.last), s, splat(-kInfinity));
    store(p, s);
  }
}

// Running state of kLanes rows: the maximum in use, the true one, and the sum of p.
struct SoftmaxState {
  float* max;
  float* true_max;
  float* sum;
};

// Takes the maxima of rows [begin, end) of kVectors vectors of columns into the state. alpha: what
// earlier sums and outputs are to be multiplied by. Returns whether that is anything but 1.
template <int kVectors>
FAP_INLINE bool update_maximum(const float* scores, int64_t stride, int begin, int end,
                               float factor, SoftmaxState state, float* alpha) {
  Vec maximum[2][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) maximum[0][v] = maximum[1][v] = splat(-kInfinity);
  for (int key = begin; key < end; key += 2) {  // blocks have an even number of keys
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      maximum[0][v] = max(load(scores + key * stride + v * kLanes), maximum[0][v]);
      maximum[1][v] = max(load(scores + (key + 1) * stride + v * kLanes), maximum[1][v]);
    }
  }
  VecI changed{};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vec block_max = max(maximum[0][v], maximum[1][v]) * factor;
    const Vec old_max = load(state.max + v * kLanes);
    const VecI grown = block_max > old_max + kMaxSlack;
    const Vec new_max = select(grown, block_max, old_max);
    store(state.true_max + v * kLanes, max(block_max, load(state.true_max + v * kLanes)));
    store(state.max + v * kLanes, new_max);
    store(alpha + v * kLanes, select(grown, exp2(old_max - new_max), splat(1.0f)));
    changed |= grown;
  }
  return any(changed);
}

// The dropout words of 32 columns from `column` on, a multiple of 32.
FAP_NOINLINE inline void dropout_words_32(const Dropout& dropout, const DropoutLanes& lanes,
                                          int64_t batch, int64_t column, VecU* words) {
  for (int c = 0; c < 8; ++c) {
    VecU word[4];
    dropout_words(dropout, lanes, batch, dropout_column_counter(column) + c, word);
    for (int i = 0; i < 4; ++i) words[c + 8 * i] = word[i];
  }
}

// p of rows [begin, end) of kVectors vectors of columns: sums into the state, and, dropped ones as
// 0, through write(key, v, even, odd) for two keys at a time. dropout: null when off; `batch`,
// `first_column`: of the block's key 0, a multiple of 32. meanwhile() is called once for every two
// keys.
template <int kVectors, int kExpDegree, typename Write, typename Meanwhile>
FAP_INLINE void exponentiate(const float* scores, int64_t stride, int begin, int end, float factor,
                             SoftmaxState state, const Dropout* dropout, const LaneRows* rows,
                             int64_t batch, int64_t first_column, const Write& write,
                             const Meanwhile& meanwhile) {
  Vec sum[kVectors], shift[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = load(state.sum + v * kLanes);
    const Vec maximum = load(state.max + v * kLanes);
    shift[v] = select(maximum == -kInfinity, Vec{}, -maximum);
  }
  VecU words[kVectors][32];
  for (int key = begin; key < end; key += 2) {
    if (dropout != nullptr && (key == begin || key % 32 == 0)) {
      for (int v = 0; v < kVectors; ++v) {
        dropout_words_32(*dropout, rows[v].dropout, batch, first_column + key / 32 * 32, words[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* p = scores + key * stride + v * kLanes;
      Vec even = exp2<kExpDegree>(fma(load(p), splat(factor), shift[v]));
      Vec odd = exp2<kExpDegree>(fma(load(p + stride), splat(factor), shift[v]));
      sum[v] = sum[v] + (even + odd);
      if (dropout != nullptr) {
        const DropoutLanes& lanes = rows[v].dropout;
        even = select(dropout_keeps(*dropout, lanes, words[v][key % 32]), even, Vec{});
        odd = select(dropout_keeps(*dropout, lanes, words[v][key % 32 + 1]), odd, Vec{});
      }
      write(key, v, even, odd);
    }
    meanwhile();
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(state.sum + v * kLanes, sum[v]);
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
