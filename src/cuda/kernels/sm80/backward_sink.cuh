// The gradient of one head's attention sink: minus the sum over all rows of exp(sink - lse) D, in
// double and in an order that depends on the shapes alone. A block of threads takes one head.
#pragma once

#include "cuda/kernels/ptx.cuh"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

extern "C" __global__ void __launch_bounds__(spec.threads())
    attention_backward_sink(const __grid_constant__ BackwardArgs args) {
  __shared__ double sums[spec.threads()];
  const BackwardParams& params = args.params;
  const int64_t head = blockIdx.x;
  const float sink = params.s_aux[head * params.s_aux_stride];
  const int thread = static_cast<int>(threadIdx.x);
  const bool packed = params.cu_seqlens_q != nullptr;
  const int64_t batches = packed ? 1 : params.batch;
  const int64_t rows = packed ? params.total_q : params.seqlen_q;

  double sum = 0.0;
  if (sink != -kInfinity) {
    for (int64_t batch = 0; batch < batches; ++batch) {
#pragma unroll 4
      for (int64_t row = thread; row < rows; row += spec.threads()) {
        const auto at = [&](const RowVector& x) {
          return x.data[batch * x.batch_stride + head * x.head_stride + row * x.row_stride];
        };
        const float softmax_d = at(params.softmax_d), lse = at(params.softmax_lse);
        // Rows of no sequence have softmax_d = 0.
        if (softmax_d != 0.0f) sum += exp2_approx((sink - lse) * kLog2E) * softmax_d;
      }
    }
  }
  sums[thread] = sum;
#pragma unroll
  for (int half = spec.threads() / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) params.ds_aux[head * params.ds_aux_stride] = static_cast<float>(-sums[0]);
}

}  // namespace flash_attn_plus::cuda
