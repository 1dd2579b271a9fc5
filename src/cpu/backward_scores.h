// What happens to a tile of scores between the products: from S = Q K^T and dP = dO V^T to the
// probabilities P and to dS, rounded and laid out for the products that follow.
//
// A tile has kTileM query rows and kTileN keys, the lanes of a vector being keys. Softcap and ALiBi
// rewrite the scores first and leave what the gradient needs in a buffer beside them; a tile
// without them and without dropout takes a shorter way.
#pragma once

#include <algorithm>

#include "attention/mask.h"
#include "attention/params.h"
#include "cpu/backward_operands.h"
#include "cpu/dropout_lanes.h"
#include "cpu/vector_math.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Factors of the entries of one strip: 0 where dropout drops, else 1 / (1 - p). Starts at the row
// that is a multiple of 16 and the key that is a multiple of 32, where Philox blocks start.
struct DropoutFactors {
  static constexpr int64_t kRowAlignment = 16;
  static constexpr int64_t kKeyAlignment = 32;

  float* data;
  int64_t stride;
  int64_t first_row;
  int64_t first_key;

  const float* at(int64_t row, int64_t key) const {
    return data + (row - first_row) * stride + (key - first_key);
  }
};

// Fills the factors of some rows and keys. A block of Philox gives two rows, 8 apart, and four
// keys, 8 apart: the lanes take 8 consecutive keys, or 4, and, where there are 16, two rows.
inline void fill_dropout_factors(const Dropout& dropout, int64_t batch, int64_t head, Range rows,
                                 Range keys, DropoutFactors& factors) {
  constexpr int kKeys = std::min(kLanes, 8);
  constexpr int kRows = kLanes / kKeys;
  factors.first_row = rows.begin / 16 * 16;
  factors.first_key = keys.begin / 32 * 32;
  const VecI lane = lane_index();
  const VecU lane_key = bits<VecU>(lane & (kKeys - 1));
  const VecU lane_row = bits<VecU>(lane / kKeys);
  for (int64_t row16 = factors.first_row; row16 < rows.end; row16 += 16) {
    for (int64_t key32 = factors.first_key; key32 < keys.end; key32 += 32) {
      float* block =
          factors.data + (row16 - factors.first_row) * factors.stride + (key32 - factors.first_key);
      for (int row = 0; row < 8; row += kRows) {
        for (int key = 0; key < 8; key += kKeys) {
          VecU counter[4] = {lane_row + dropout_row_counter(row16 + row),
                             lane_key + dropout_column_counter(key32 + key),
                             splat(static_cast<uint32_t>(head)),
                             splat(static_cast<uint32_t>(batch))};
          philox(dropout, counter);
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
            const VecU number = i < 4 ? counter[i] & 0xFFFFu : counter[i - 4] >> 16;
            const VecI kept = bits<VecI>(number) < static_cast<int32_t>(dropout.threshold);
            const Vec factor = select(kept, splat(dropout.scale), Vec{});
            float* target = block + (row + i / 4 * 8) * factors.stride + key + i % 4 * 8;
            for (int r = 0; r < kRows; ++r) {
              std::memcpy(target + r * factors.stride,
                          reinterpret_cast<const float*>(&factor) + r * kKeys, 4 * kKeys);
            }
          }
        }
      }
    }
  }
}

// How scores become logits, for one head.
struct ScoreRule {
  float softmax_scale;
  float softcap;         // 0: off
  float alibi_slope;     // 0: off
  float exponent_scale;  // what a (rewritten) score is multiplied with to be an exponent of 2

  bool rewrites() const { return softcap > 0.0f || alibi_slope != 0.0f; }
};

inline ScoreRule make_score_rule(const AttentionParams& params, int64_t batch, int64_t head) {
  ScoreRule rule{params.softmax_scale, params.softcap, 0.0f, 0.0f};
  if (params.alibi_slopes != nullptr) {
    rule.alibi_slope =
        params.alibi_slopes[batch * params.alibi_batch_stride + head * params.alibi_head_stride];
  }
  rule.exponent_scale = rule.rewrites() ? kLog2E : params.softmax_scale * kLog2E;
  return rule;
}

// Writes scores as logits, in place, and d tanh, 1 - tanh^2, where there is softcap. `diagonal` is
// the key that is on the diagonal in the tile's first row, counted from its first key.
template <int kTileM, int kTileN>
inline void rewrite_scores(const ScoreRule& rule, int64_t diagonal, float* scores,
                           float* derivative) {
  const float inner = rule.softmax_scale / rule.softcap;
  for (int row = 0; row < kTileM; ++row) {
    for (int key = 0; key < kTileN; key += kLanes) {
      float* p = scores + row * kTileN + key;
      Vec s = load(p);
      if (rule.softcap > 0.0f) {
        const Vec t = tanh(s * inner);
        s = t * rule.softcap;
        store(derivative + row * kTileN + key, 1.0f - t * t);
      } else {
        s *= rule.softmax_scale;
      }
      if (rule.alibi_slope != 0.0f) {
        const Vec distance = to_float(lane_index() + static_cast<int32_t>(key - row - diagonal));
        s -= abs(distance) * rule.alibi_slope;
      }
      store(p, s);
    }
  }
}

// One tile and where its results go.
template <int kNumParts>
struct ScoreTile {
  using Operands = BackwardOperands<kNumParts>;

  const float* scores;     // (kTileM, kTileN)
  const float* dp;         // (kTileM, kTileN)
  const float* lse;        // of its rows, times log2(e)
  const float* softmax_d;  // of its rows, times softmax_scale
  float exponent_scale;
  float softmax_scale;
  const float* derivative;  // (kTileM, derivative_stride); ones and stride 0 without softcap
  int64_t derivative_stride;
  const float* dropout;  // (kTileM, dropout_stride); ones and stride 0 without dropout
  int64_t dropout_stride;
  const int32_t* visible_begin;  // of each row, from the tile's first key on; only where masked
  const int32_t* visible_end;
  typename Operands::Matrix p_panel, ds_panel, ds_rows;  // from the tile's first row on
};

// P = exp(S - lse), dropped out for dV, and dS = P (dP - D), D being the row sums of dO * O: the
// gradient of the scores before scaling, times the scale. A masked entry is 0 whatever the operands
// are. Meanwhile the products of the next tile go on.
template <int kNumParts, bool kMasked, bool kModified>
inline void finish_tile(const ScoreTile<kNumParts>& tile,
                        typename BackwardOperands<kNumParts>::ScoreProducts& next) {
  using Operands = BackwardOperands<kNumParts>;
  constexpr int kTileM = Operands::kTileM, kTileN = Operands::kTileN;
  constexpr int kExpDegree = kNumParts == 1 ? 3 : kNumParts == 2 ? 4 : 5;
  const Vec exponent_scale = splat(tile.exponent_scale);
  const Vec softmax_scale = splat(tile.softmax_scale);
  for (int row = 0; row < kTileM; row += 2) {
    for (int key = 0; key < kTileN; key += kLanes) {
      Vec p[2], ds[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t r = row + i;
        const Vec s = load(tile.scores + r * kTileN + key);
        const Vec dp = load(tile.dp + r * kTileN + key);
        p[i] = exp2<kExpDegree>(fma(s, exponent_scale, -splat(tile.lse[r])));
        Vec scale = softmax_scale;
        Vec factor;
        if constexpr (kModified) {
          factor = load(tile.dropout + r * tile.dropout_stride + key);
          scale *= factor;
        }
        ds[i] = p[i] * fma(dp, scale, -splat(tile.softmax_d[r]));
        if constexpr (kModified) {
          ds[i] *= load(tile.derivative + r * tile.derivative_stride + key);
          p[i] *= factor;
        }
        if constexpr (kMasked) {
          const VecI k = lane_index() + key;
          const VecI visible = (k >= tile.visible_begin[r]) & (k < tile.visible_end[r]);
          p[i] = select(visible, p[i], Vec{});
          ds[i] = select(visible, ds[i], Vec{});
        }
      }
      Operands::store_panel(p[0], p[1], tile.p_panel, row, key);
      Operands::store_panel_and_rows(ds[0], ds[1], tile.ds_panel, tile.ds_rows, row, key);
      next.advance();
    }
  }
  next.complete();
}

template <int kNumParts>
inline void finish_tile(const ScoreTile<kNumParts>& tile, bool masked, bool modified,
                        typename BackwardOperands<kNumParts>::ScoreProducts& next) {
  if (masked) {
    modified ? finish_tile<kNumParts, true, true>(tile, next)
             : finish_tile<kNumParts, true, false>(tile, next);
  } else {
    modified ? finish_tile<kNumParts, false, true>(tile, next)
             : finish_tile<kNumParts, false, false>(tile, next);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
