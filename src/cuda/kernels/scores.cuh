// What happens to a block of scores between the two products: scale, cap, bias, mask, softmax,
// dropout, on the accumulators of mma().
//
// A warp holds 16 kM rows and 8 kN columns: s[m][n][i], where i = 0, 1 is row 16 m + lane / 4 and
// i = 2, 3 the row 8 below, column 8 n + 2 (lane % 4) + i % 2.
#pragma once

#include "attention/dropout.h"
#include "attention/mask.h"
#include "cuda/kernels/ptx.cuh"
#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

template <int kM, int kN>
using Fragments = float[kM][kN][4];

// Which of a thread's 2 kM rows entry i of fragment m belongs to.
FAP_DEVICE constexpr int row_slot(int m, int i) { return 2 * m + i / 2; }

// tanh with a relative error of 6e-7, where the instruction's is 5e-4: in a capped score that would
// be more than the rounding of its exponential to 16 bits. By its exponential, and where that
// cancels, near 0, by a polynomial.
//
// The argument of all these is four times x, so that bit 30 says whether |x| is 1/2 or more (or a
// NaN).
FAP_DEVICE float tanh_near(float x4) {
  const float square = x4 * x4;
  float y = fmaf(square, -2.7100953e-06f, 1.2881149e-04f);
  y = fmaf(square, y, -5.2072373e-03f);
  return x4 * fmaf(square, y, 2.4999987e-01f);
}
FAP_DEVICE float tanh_far(float x4) {
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(x4 * (0.5f * kLog2E)) + 1.0f);
}
FAP_DEVICE bool is_far(float x4) { return (__float_as_uint(x4) & 0x40000000u) != 0; }
FAP_DEVICE float tanh_of(float x4) { return is_far(x4) ? tanh_far(x4) : tanh_near(x4); }

// Scales a block to the argument of the functions above and returns whether any is far. Scores are
// small beside their cap almost always, and then the polynomial alone, which needs none of the
// exponential's slow units, serves the warp.
template <int kM, int kN>
FAP_DEVICE bool scale_to_tanh(Fragments<kM, kN>& s, float scale) {
  uint32_t far = 0;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] *= 4.0f * scale;
        far |= __float_as_uint(s[m][n][i]);
      }
    }
  }
  return __any_sync(0xFFFFFFFFu, is_far(__uint_as_float(far)));
}

// tanh(s * scale) of a block.
template <int kM, int kN>
FAP_DEVICE void tanh_scores(Fragments<kM, kN>& s, float scale) {
  if (scale_to_tanh(s, scale)) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = tanh_of(s[m][n][i]);
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = tanh_near(s[m][n][i]);
      }
    }
  }
}

// Scores in units of log2: scale, then softcap, then ALiBi.
struct ScoreTransform {
  float scale;    // of the products, to log2; with softcap to its argument
  float softcap;  // in log2
  float slope;    // in log2

  FAP_DEVICE ScoreTransform(const AttentionParams& params, bool has_softcap, int64_t batch,
                            int64_t head)
      : scale(has_softcap ? params.softmax_scale / params.softcap : params.softmax_scale * kLog2E),
        softcap(params.softcap * kLog2E),
        slope(params.alibi_slopes == nullptr
                  ? 0.0f
                  : params.alibi_slopes[batch * params.alibi_batch_stride +
                                        head * params.alibi_head_stride] *
                        kLog2E) {}

  // `distance` is i + off - j.
  template <bool kSoftcap, bool kAlibi>
  FAP_DEVICE float operator()(float product, float distance) const {
    if constexpr (kSoftcap) {
      const float capped = softcap * tanh_of(product * scale * 4.0f);
      return kAlibi ? fmaf(-slope, fabsf(distance), capped) : capped;
    } else {
      return kAlibi ? fmaf(product, scale, -slope * fabsf(distance)) : product * scale;
    }
  }
};

template <int kM, int kN>
FAP_DEVICE void scale_scores(Fragments<kM, kN>& s, float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] *= factor;
    }
  }
}

// i + off - j of a thread's entries: that of its first, given the block's first column and i + off
// of the thread's first row, and what the others' differ from it by.
FAP_DEVICE float first_distance(int row_position, int column) {
  return static_cast<float>(row_position - column - lane_id() % 4 * 2);
}
FAP_DEVICE constexpr float distance_from_first(int m, int n, int i) {
  return static_cast<float>(16 * m + i / 2 * 8 - 8 * n - i % 2);
}

// s = s - slope * |i + off - j|; `first` is first_distance(). A thread's entries have few
// distances, and the compiler finds them.
template <int kM, int kN>
FAP_DEVICE void bias_scores(Fragments<kM, kN>& s, float slope, float first) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] += -slope * fabsf(first + distance_from_first(m, n, i));
      }
    }
  }
}

// The mask of a sequence in the arithmetic of the inner loop: 32 bits, which hold every sum below
// because lengths are below 2^30 (the planner sees to it), and infinite sides as 2^30.
struct KeyBounds {
  int seqlen_k;
  int offset;       // seqlen_k - seqlen_q
  int left, right;  // keys visible on either side of i + offset

  FAP_DEVICE explicit KeyBounds(const Mask& mask)
      : seqlen_k(static_cast<int>(mask.seqlen_k)),
        offset(static_cast<int>(mask.offset())),
        left(mask.window_left < 0 ? 1 << 30 : static_cast<int>(mask.window_left)),
        right(mask.window_right < 0 ? 1 << 30 : static_cast<int>(mask.window_right)) {}
};

// Whether one of kRows rows from `row` on may see one of `columns` keys from `column` on.
template <Masking kMasking, int kRows>
FAP_DEVICE bool sees_keys(const KeyBounds& bounds, int row, int column, int columns) {
  bool sees = column < bounds.seqlen_k;
  if constexpr (kMasking != Masking::kNone) {
    sees = sees && column <= row + kRows - 1 + bounds.offset + bounds.right;
  }
  if constexpr (kMasking == Masking::kWindow) {
    sees = sees && column + columns > row + bounds.offset - bounds.left;
  }
  return sees;
}

// Hides the keys that a row does not see: those from seqlen_k on, and those outside the window.
// `row` is the thread's first row and `column` the block's first.
template <Masking kMasking, int kM, int kN>
FAP_DEVICE void mask_scores(Fragments<kM, kN>& s, const KeyBounds& bounds, int row, int column) {
  const int first = column + lane_id() % 4 * 2;
  int diagonal = row + bounds.offset - first;
  asm volatile("" : "+r"(diagonal));  // or the bounds of all rows would wait in registers
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    int end = bounds.seqlen_k - first;
    if constexpr (kMasking != Masking::kNone)
      end = min(end, diagonal + 8 * slot + bounds.right + 1);
    const int begin = diagonal + 8 * slot - bounds.left;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 8 * n + i;
        const bool hidden = j >= end || (kMasking == Masking::kWindow && j < begin);
        if (hidden) s[slot / 2][n][slot % 2 * 2 + i] = -kInfinity;
      }
    }
  }
}

// Zeroes the entries that dropout drops. `row` is the first of the warp's rows and `column` of the
// block's, inside the sequence, multiples of 16 and 32. A threshold of 0 is for the caller to see
// to.
template <int kM, int kN>
FAP_DEVICE void drop_scores(Fragments<kM, kN>& p, const Dropout& dropout, uint32_t batch,
                            uint32_t head, int row, int column) {
  static_assert(kN % 4 == 0);
  // Numbers are compared in the upper half of a word, whatever is in the lower: with the last word
  // that is kept, because the first that is not may be 2^32.
  const uint32_t last = (dropout.threshold << 16) - 1;
  const int lane = lane_id();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const PhiloxBlock block =
            philox({{dropout_row_counter(row + 16 * m + lane / 4),
                     dropout_column_counter(column + 8 * n + lane % 4 * 2 + side), head, batch}},
                   dropout.key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (block.word[i] << 16 > last) p[m][n + i][side] = 0.0f;
          if (block.word[i] > last) p[m][n + i][2 + side] = 0.0f;
        }
      }
    }
  }
}

struct Itself {
  FAP_DEVICE float operator()(float x) const { return x; }
};

// The softmax of rows seen block by block (Milakov and Gimelshein, arXiv:1805.02867).
//
// The reference that exponents are taken against is the largest score when it was last moved: it is
// left alone until a score passes it by kSlack, which the float32 sums and the 16-bit weights hold
// without loss, so that after the first blocks the output need not be scaled again.
template <int kM>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;  // in log2
  // Of a row that has seen no key: below every score, and finite, because its difference to -inf
  // and to itself is taken.
  static constexpr float kNone = -3e38f;

  float reference[2 * kM];  // in log2
  float sum[2 * kM];        // the thread's part of the sum of exponentials

  FAP_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int slot = 0; slot < 2 * kM; ++slot) {
      reference[slot] = kNone;
      sum[slot] = 0.0f;
    }
  }

  // Turns scores into weights exp2(score(s) * multiplier - reference), and rescales `out` when a
  // reference moves. `multiplier` is positive and `score` increases: it is the caller's last step,
  // taken here so that it can run beside the products that follow.
  template <int kN, int kD, typename Score = Itself>
  FAP_DEVICE void update(Fragments<kM, kN>& s, Fragments<kM, kD>& out, float multiplier,
                         Score score = {}) {
    float largest[2 * kM];
    bool moves = false;
#pragma unroll
    for (int slot = 0; slot < 2 * kM; ++slot) {
      const int m = slot / 2, i = slot % 2 * 2;
      float most = fmaxf(s[m][0][i], s[m][0][i + 1]);
#pragma unroll
      for (int n = 1; n < kN; ++n) most = fmaxf(most, fmaxf(s[m][n][i], s[m][n][i + 1]));
      largest[slot] = score(quad_max(most)) * multiplier;
      moves |= largest[slot] > reference[slot] + kSlack;
    }
    if (__any_sync(0xFFFFFFFFu, moves)) {
#pragma unroll
      for (int slot = 0; slot < 2 * kM; ++slot) {
        const float moved = fmaxf(reference[slot], largest[slot]);
        const float factor = exp2_approx(reference[slot] - moved);
        reference[slot] = moved;
        sum[slot] *= factor;
#pragma unroll
        for (int n = 0; n < kD; ++n) {
          out[slot / 2][n][slot % 2 * 2] *= factor;
          out[slot / 2][n][slot % 2 * 2 + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int slot = row_slot(m, i);
          s[m][n][i] = exp2_approx(fmaf(score(s[m][n][i]), multiplier, -reference[slot]));
          sum[slot] += s[m][n][i];
        }
      }
    }
  }

  // The sums of whole rows. Call once, at the end.
  FAP_DEVICE void finish() {
#pragma unroll
    for (int slot = 0; slot < 2 * kM; ++slot) sum[slot] = quad_sum(sum[slot]);
  }

  // With every row's sum finished: log2 of the sum of exp2 over the visible keys and the sink (a
  // score in log2; -inf when there is none), and what the row's output is to be multiplied by.
  // Without either the first is +inf and the second 0.
  FAP_DEVICE float log2_sum(int slot, float sink, float* inverse) const {
    // Relative to the larger of the two, so that neither overflows.
    const float top = fmaxf(reference[slot], sink);
    if (top == kInfinity) {  // inf / inf
      *inverse = __int_as_float(0x7FC00000);
      return top;
    }
    const float scaled = exp2_approx(reference[slot] - top);
    const bool none = sum[slot] == 0.0f;
    const float keys = none ? 0.0f : sum[slot] * scaled;
    const float total = keys + (sink == -kInfinity ? 0.0f : exp2_approx(sink - top));
    *inverse = none ? 0.0f : scaled / total;
    return total == 0.0f ? kInfinity : top + log2_approx(total);
  }
};

}  // namespace flash_attn_plus::cuda
