/* Causal attention with grouped heads through the C ABI, checked against the formula in double.
 * Exit status 0 when every number agrees. */
#include <flash_attn_plus/attention.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kBatch = 2, kSeqlen = 100, kHeads = 4, kHeadsK = 2, kHeadDim = 64 };

/* A compact row-major float32 tensor on the CPU; NULL strides say compact. */
static fap_tensor float_tensor(float* data, int32_t ndim, int64_t* shape) {
  fap_tensor tensor = {data, {1 /* kDLCPU */, 0}, ndim, {2 /* kDLFloat */, 32, 1}, shape, NULL, 0};
  return tensor;
}

static float* random_floats(int64_t count) {
  float* data = malloc(count * sizeof(float));
  for (int64_t i = 0; i < count; ++i) data[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
  return data;
}

static const float* row(const float* data, int heads, int b, int i, int h) {
  return data + (((int64_t)b * kSeqlen + i) * heads + h) * kHeadDim;
}

/* Largest difference of one output row from the formula. */
static double row_error(const float* q, const float* k, const float* v, const float* out, int b,
                        int i, int h) {
  const int head_k = h / (kHeads / kHeadsK);
  double weight[kSeqlen], maximum = -INFINITY, sum = 0.0, error = 0.0;
  for (int j = 0; j <= i; ++j) {
    double dot = 0.0;
    for (int c = 0; c < kHeadDim; ++c) {
      dot += (double)row(q, kHeads, b, i, h)[c] * row(k, kHeadsK, b, j, head_k)[c];
    }
    weight[j] = dot / sqrt(kHeadDim);
    maximum = fmax(maximum, weight[j]);
  }
  for (int j = 0; j <= i; ++j) sum += weight[j] = exp(weight[j] - maximum);
  for (int c = 0; c < kHeadDim; ++c) {
    double expected = 0.0;
    for (int j = 0; j <= i; ++j) expected += weight[j] / sum * row(v, kHeadsK, b, j, head_k)[c];
    error = fmax(error, fabs(expected - row(out, kHeads, b, i, h)[c]));
  }
  return error;
}

int main(void) {
  int64_t shape_q[] = {kBatch, kSeqlen, kHeads, kHeadDim};
  int64_t shape_k[] = {kBatch, kSeqlen, kHeadsK, kHeadDim};
  int64_t shape_lse[] = {kBatch, kHeads, kSeqlen};
  const int64_t size_q = (int64_t)kBatch * kSeqlen * kHeads * kHeadDim;
  const int64_t size_k = (int64_t)kBatch * kSeqlen * kHeadsK * kHeadDim;
  float* q = random_floats(size_q);
  float* k = random_floats(size_k);
  float* v = random_floats(size_k);
  float* out = malloc(size_q * sizeof(float));
  float* lse = malloc((int64_t)kBatch * kHeads * kSeqlen * sizeof(float));

  fap_tensor tensor_q = float_tensor(q, 4, shape_q);
  fap_tensor tensor_k = float_tensor(k, 4, shape_k);
  fap_tensor tensor_v = float_tensor(v, 4, shape_k);
  fap_tensor tensor_out = float_tensor(out, 4, shape_q);
  fap_tensor tensor_lse = float_tensor(lse, 3, shape_lse);

  fap_forward_args args = {.size = sizeof args};
  args.q = &tensor_q;
  args.k = &tensor_k;
  args.v = &tensor_v;
  args.out = &tensor_out;
  args.softmax_lse = &tensor_lse;
  args.softmax_scale = 1.0 / sqrt(kHeadDim);
  args.causal = 1;
  args.window_left = -1;
  args.window_right = -1;
  if (fap_forward(&args) != FAP_OK) {
    fprintf(stderr, "fap_forward: %s\n", fap_last_error());
    return 1;
  }

  double error = 0.0;
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i < kSeqlen; ++i) {
      for (int h = 0; h < kHeads; ++h) error = fmax(error, row_error(q, k, v, out, b, i, h));
    }
  }
  printf("FlashAttention-Plus %s on %s: largest error %.1e\n", fap_version(), fap_cpu_isa(), error);

  /* A refused call computes nothing and says why. */
  tensor_k.shape = shape_q;
  if (fap_forward(&args) == FAP_OK) {
    fprintf(stderr, "k and v of different shapes were not refused\n");
    return 1;
  }
  printf("k and v of different shapes are refused: %s\n", fap_last_error());

  free(q), free(k), free(v), free(out), free(lse);
  return error < 1e-5 ? 0 : 1;
}
