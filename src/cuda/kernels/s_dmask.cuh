// S_dmask: what dropout did to the softmax, for tests. Entry (row, column) is
// exp(score - row maximum), negative where it was dropped, 0 where it is masked.
//
// A block of threads computes rows one after the other, in two passes over the keys, each product
// anew by one thread: simple, and as slow as that.
#pragma once

#include "attention/dropout.h"
#include "attention/sequence.h"
#include "cuda/kernels/scores.cuh"
#include "cuda/spec/s_dmask.h"

namespace flash_attn_plus::cuda {

struct RowScores {
  const ForwardParams& params;
  const Sequence sequence;
  const ScoreTransform transform;
  const uint16_t* q;
  int64_t batch, head_k;
  int64_t diagonal;  // i + off

  FAP_DEVICE float operator()(int64_t column) const {
    const uint16_t* k = static_cast<const uint16_t*>(params.k.data) +
                        key_row_offset(params, params.k, batch, sequence.k_begin + column) +
                        head_k * params.k.head_stride;
    float product = 0.0f;
    for (int64_t d = 0; d < params.head_dim; ++d) {
      product = fmaf(unpack1<spec.dtype>(q[d]), unpack1<spec.dtype>(k[d]), product);
    }
    const float distance = static_cast<float>(diagonal - column);
    return params.softcap > 0 ? transform.operator()<true, true>(product, distance)
                              : transform.operator()<false, true>(product, distance);
  }
};

FAP_DEVICE float block_max(float x) {
  __shared__ float parts[spec.threads() / 32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
  }
  __syncthreads();
  if (lane_id() == 0) parts[threadIdx.x / 32] = x;  // warp_id() is for whole warps
  __syncthreads();
#pragma unroll
  for (int i = 0; i < spec.threads() / 32; ++i) x = fmaxf(x, parts[i]);
  return x;
}

extern "C" __global__ void __launch_bounds__(spec.threads())
    attention_s_dmask(const __grid_constant__ SDmaskArgs args) {
  const ForwardParams& params = args.params;
  const Dropout dropout = make_dropout(params);
  const int64_t num_rows = params.batch * params.num_heads * params.s_dmask_rows;
  for (int64_t index = blockIdx.x; index < num_rows; index += gridDim.x) {
    const int64_t row = index % params.s_dmask_rows;
    const int64_t head = index / params.s_dmask_rows % params.num_heads;
    const int64_t batch = index / params.s_dmask_rows / params.num_heads;
    const Sequence sequence = sequence_at(params, batch);
    const Mask mask = sequence.mask(params);
    const Range visible = row < sequence.seqlen_q ? mask.visible_keys(row) : Range{0, 0};
    const RowScores score{
        params,
        sequence,
        ScoreTransform(params, params.softcap > 0, batch, head),
        static_cast<const uint16_t*>(params.q.data) + batch * params.q.batch_stride +
            (sequence.q_begin + row) * params.q.row_stride + head * params.q.head_stride,
        batch,
        head / params.group_size(),
        row + mask.offset()};
    float largest = -kInfinity;
    for (int64_t j = visible.begin + threadIdx.x; j < visible.end; j += spec.threads()) {
      largest = fmaxf(largest, score(j));
    }
    largest = block_max(largest);
    uint16_t* out = static_cast<uint16_t*>(params.s_dmask) + batch * params.s_dmask_batch_stride +
                    head * params.s_dmask_head_stride + row * params.s_dmask_row_stride;
    for (int64_t j = threadIdx.x; j < params.s_dmask_cols; j += spec.threads()) {
      float value = 0.0f;
      if (j >= visible.begin && j < visible.end) {
        value = exp2_approx(score(j) - largest);
        if (!dropout_keeps(dropout, batch, head, row, j)) value = -value;
      }
      out[j] = pack1<spec.dtype>(value);
    }
  }
}

}  // namespace flash_attn_plus::cuda
