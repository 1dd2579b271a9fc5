// What cuda/kernels/scores.cuh does to blocks of scores, and the numbers of dropout.
//
// Masking kMasking; bool kSoftcap, kAlibi; int kM, kN: a warp holds 16 kM rows and 8 kN columns.
// Matrices are (rows, columns), whole blocks; blocks of the grid are numbered by column, then row.
#include "cuda/kernels/scores.cuh"

namespace flash_attn_plus::cuda {

constexpr int kBlockRows = 16 * kM, kBlockCols = 8 * kN;

// Where a warp's block begins.
struct Place {
  int row, col;
  int64_t num_cols;  // of the matrix

  FAP_DEVICE explicit Place(int64_t num_cols)
      : row(static_cast<int>(blockIdx.x / (num_cols / kBlockCols)) * kBlockRows),
        col(static_cast<int>(blockIdx.x % (num_cols / kBlockCols)) * kBlockCols),
        num_cols(num_cols) {}
  FAP_DEVICE int thread_row() const { return row + lane_id() / 4; }
  FAP_DEVICE int64_t index(int m, int n, int i) const {
    return (thread_row() + 16 * m + i / 2 * 8) * num_cols + col + 8 * n + lane_id() % 4 * 2 + i % 2;
  }
};

FAP_DEVICE void load(Fragments<kM, kN>& s, const float* x, const Place& place) {
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int i = 0; i < 4; ++i) s[m][n][i] = x[place.index(m, n, i)];
    }
  }
}

FAP_DEVICE void store(const Fragments<kM, kN>& s, float* out, const Place& place) {
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int i = 0; i < 4; ++i) out[place.index(m, n, i)] = s[m][n][i];
    }
  }
}

extern "C" __global__ void capped(const float* x, float* out, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = tanh_of(4.0f * x[i]);
}

extern "C" __global__ void masked(float* x, int64_t num_cols, int64_t seqlen_q, int64_t seqlen_k,
                                  int64_t window_left, int64_t window_right) {
  const Place place(num_cols);
  Fragments<kM, kN> s;
  load(s, x, place);
  mask_scores<kMasking>(s, KeyBounds(Mask{seqlen_q, seqlen_k, window_left, window_right}),
                        place.thread_row(), place.col);
  store(s, x, place);
}

extern "C" __global__ void transformed(float* x, int64_t num_cols, const float* slope,
                                       int64_t offset, double softmax_scale, double softcap) {
  const Place place(num_cols);
  AttentionParams params;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.softcap = static_cast<float>(softcap);
  params.alibi_slopes = slope;
  Fragments<kM, kN> s;
  load(s, x, place);
  const ScoreTransform transform(params, kSoftcap, 0, 0);
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int64_t index = place.index(m, n, i);
        const float distance = static_cast<float>(index / num_cols + offset - index % num_cols);
        s[m][n][i] = transform.operator()<kSoftcap, kAlibi>(s[m][n][i], distance);
      }
    }
  }
  store(s, x, place);
}

// The same of whole blocks: softcap * tanh(x * scale), or x * scale, less slope * |distance|.
extern "C" __global__ void transformed_blocks(float* x, int64_t num_cols, int64_t offset,
                                              double scale, double softcap, double slope) {
  const Place place(num_cols);
  Fragments<kM, kN> s;
  load(s, x, place);
  if constexpr (kSoftcap) tanh_scores(s, static_cast<float>(scale));
  scale_scores(s, static_cast<float>(kSoftcap ? softcap : scale));
  if constexpr (kAlibi) {
    const int position = place.thread_row() + static_cast<int>(offset);
    bias_scores(s, static_cast<float>(slope), first_distance(position, place.col));
  }
  store(s, x, place);
}

extern "C" __global__ void dropped(float* x, int64_t num_cols, const int64_t* rng_state, double p,
                                   int64_t batch, int64_t head) {
  const Place place(num_cols);
  AttentionParams params;
  params.dropout_p = p;
  params.rng_state = rng_state;
  Fragments<kM, kN> s;
  load(s, x, place);
  drop_scores(s, make_dropout(params), static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
              place.row, place.col);
  store(s, x, place);
}

// counters and out: (n, 4); key: (2).
extern "C" __global__ void random_words(const uint32_t* counters, const uint32_t* key,
                                        uint32_t* out, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t* c = counters + 4 * i;
  const PhiloxBlock block = philox({{c[0], c[1], c[2], c[3]}}, {{key[0], key[1]}});
  for (int word = 0; word < 4; ++word) out[4 * i + word] = block.word[word];
}

// One warp; x (16 kM, num_cols) scores, block after block of 8 kN columns. `out` (16 kM, 8 kN): the
// softmax, its blocks added up; log2_sums (16 kM); sinks (16 kM) are scores in log2.
extern "C" __global__ void softmax(const float* x, const float* sinks, float* out, float* log2_sums,
                                   int64_t num_cols, double multiplier) {
  Place place(num_cols);
  OnlineSoftmax<kM> softmax;
  Fragments<kM, kN> s, sum = {};
  for (; place.col < num_cols; place.col += kBlockCols) {
    load(s, x, place);
    softmax.update(s, sum, static_cast<float>(multiplier));
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int i = 0; i < 4; ++i) sum[m][n][i] += s[m][n][i];
      }
    }
  }
  softmax.finish();
  for (int m = 0; m < kM; ++m) {
    for (int i = 0; i < 4; ++i) {
      const int row = place.thread_row() + 16 * m + i / 2 * 8;
      float inverse;
      const float log2_sum = softmax.log2_sum(row_slot(m, i), sinks[row], &inverse);
      for (int n = 0; n < kN; ++n) sum[m][n][i] *= inverse;
      if (lane_id() % 4 == 0) log2_sums[row] = log2_sum;
    }
  }
  store(sum, out, Place(kBlockCols));
}

}  // namespace flash_attn_plus::cuda
