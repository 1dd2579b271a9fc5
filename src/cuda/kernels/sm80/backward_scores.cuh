// From the products S = Q K^T and dP = dO V^T to the probabilities P and to dS, in the accumulators
// of mma().
#pragma once

#include "attention/dropout.h"
#include "attention/mask.h"
#include "cuda/kernels/scores.cuh"

namespace flash_attn_plus::cuda {

// Log-sum-exps (in log2) of a warp's rows lie in shared memory at `row_values`, and, kTileM floats
// on, their D.
template <int kTileM>
FAP_DEVICE void read_row_values(float (&x)[2], uint32_t row_values, int m, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t address = row_values + (16 * m + 8 * half + lane / 4) * 4;
    x[half] = __uint_as_float(load_shared4(address));
  }
}

// P = exp(s - lse) takes the place of s; entries that dropout drops get the sign bit, those kept
// are not scaled. `row` and `column` are the first of the warp's part, inside the sequence:
// multiples of 16, the column of 32 where kN allows.
//
// With softcap dS is finished here, from dp, because its derivative is not kept.
template <bool kSoftcap, bool kAlibi, bool kDropout, int kTileM, int kM, int kN>
FAP_DEVICE void exponentiate_scores(Fragments<kM, kN>& s, Fragments<kM, kN>& dp,
                                    uint32_t row_values, const ScoreTransform& transform,
                                    int offset, const Dropout& dropout, uint32_t batch,
                                    uint32_t head, int row, int column, int lane) {
  constexpr int kGroup = kN % 4 == 0 ? 4 : 2;  // fragments that a block of Philox serves
  static_assert(kN % kGroup == 0);
  if constexpr (kSoftcap) tanh_scores(s, transform.scale);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float lse[2], softmax_d[2];
    read_row_values<kTileM>(lse, row_values, m, lane);
    if constexpr (kSoftcap) read_row_values<kTileM>(softmax_d, row_values + kTileM * 4, m, lane);
#pragma unroll
    for (int group = 0; group < kN; group += kGroup) {
      float first = static_cast<float>(row + 16 * m + lane / 4 + offset - column - lane % 4 * 2);
      // The distances of all entries at once would fill the registers.
      if constexpr (kAlibi) asm volatile("" : "+f"(first));
#pragma unroll
      for (int side = 0; side < 2; ++side) {  // of the two columns that a thread has in a fragment
        PhiloxBlock numbers;
        if constexpr (kDropout) {
          numbers = philox(
              {{dropout_row_counter(row + 16 * m + lane / 4),
                dropout_column_counter(column + 8 * group + lane % 4 * 2 + side), head, batch}},
              dropout.key);
        }
#pragma unroll
        for (int n = group; n < group + kGroup; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = 2 * half + side;
            const float distance = first + static_cast<float>(half * 8 - 8 * n - side);
            float shift = -lse[half];
            if constexpr (kAlibi) shift = fmaf(-transform.slope, fabsf(distance), shift);
            const float t = s[m][n][i];
            const float p =
                exp2_approx(fmaf(t, kSoftcap ? transform.softcap : transform.scale, shift));
            bool kept = true;
            if constexpr (kDropout) {
              // With 16 columns to a warp only one half of a block's columns is there.
              const uint32_t word = kGroup == 4 || (column & 16) == 0 ? numbers.word[n - group]
                                                                      : numbers.word[2 + n - group];
              kept = (half == 0 ? word & 0xFFFFu : word >> 16) < dropout.threshold;
            }
            if constexpr (kSoftcap) {
              const float difference = fmaf(kept ? dp[m][n][i] : 0.0f,
                                            kDropout ? dropout.scale : 1.0f, -softmax_d[half]);
              dp[m][n][i] = p * difference * fmaf(-t, t, 1.0f);
            }
            s[m][n][i] = kept ? p : -p;
          }
        }
      }
    }
  }
}

// P as it is multiplied with dO: 0 where an entry was dropped.
template <int kM, int kN>
FAP_DEVICE void keep_entries(Fragments<kM, kN>& p) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (__float_as_int(p[m][n][i]) < 0) p[m][n][i] = 0.0f;
      }
    }
  }
}

// dS = P (dP - D) takes the place of dp, dP being 0 where an entry was dropped.
template <bool kDropout, int kTileM, int kM, int kN>
FAP_DEVICE void differentiate_scores(const Fragments<kM, kN>& p, Fragments<kM, kN>& dp,
                                     uint32_t row_values, float dropout_scale, int lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float softmax_d[2];
    read_row_values<kTileM>(softmax_d, row_values + kTileM * 4, m, lane);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = p[m][n][i];
        if constexpr (kDropout) {
          const float kept = __float_as_int(x) < 0 ? 0.0f : dp[m][n][i];
          dp[m][n][i] = fabsf(x) * fmaf(kept, dropout_scale, -softmax_d[i / 2]);
        } else {
          dp[m][n][i] = x * (dp[m][n][i] - softmax_d[i / 2]);
        }
      }
    }
  }
}

// Zeroes what a row does not see: whatever the operands were, it is 0 and not NaN. Rows outside
// [rows_begin, rows_end) see nothing. `row` and `column` are the first of the warp's part.
template <int kM, int kN>
FAP_DEVICE void hide_entries(Fragments<kM, kN>& p, Fragments<kM, kN>& ds, const KeyBounds& bounds,
                             int rows_begin, int rows_end, int row, int column, int lane) {
  const int first_row = row + lane / 4, first_key = column + lane % 4 * 2;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const int query = first_row + 8 * slot;
    const int diagonal = query + bounds.offset - first_key;
    const int begin = diagonal - bounds.left;
    const bool sees = rows_begin <= query && query < rows_end;
    const int end = sees ? min(bounds.seqlen_k - first_key, diagonal + bounds.right + 1) : -1;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 8 * n + i;
        if (j < begin || j >= end) {
          p[slot / 2][n][slot % 2 * 2 + i] = 0.0f;
          ds[slot / 2][n][slot % 2 * 2 + i] = 0.0f;
        }
      }
    }
  }
}

}  // namespace flash_attn_plus::cuda
