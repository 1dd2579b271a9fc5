// Merges the parts of split keys: one block of threads a query row.
//
// The sums of all parts are read at once, one a thread, and become weights in shared memory; the
// warps take the parts in turn, each lane some columns, and their sums are added in the order of
// the warps: the result does not depend on timing. Bound by latency: so the kernel starts while
// decode ends, looks up the sequence before it waits for the parts, and asks for all sums and the
// first outputs together.
#pragma once

#include "attention/sequence.h"
#include "attention/split.h"
#include "cuda/kernels/parts.cuh"

namespace flash_attn_plus::cuda {

static_assert(kMaxSplits <= spec.threads());

FAP_DEVICE float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, i));
  return x;
}
FAP_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, i);
  return x;
}

extern "C" __global__ void __launch_bounds__(spec.threads())
    attention_combine(const __grid_constant__ DecodeArgs args) {
  __shared__ float weights[spec.threads()];
  __shared__ PartialRow of_warp[spec.warps()];
  __shared__ __align__(16) float sums[spec.warps()][spec.head_dim];
  const ForwardParams& params = args.params;
  fill_unused_rows(params);

  const int group_size = static_cast<int>(params.group_size());
  const uint32_t rows_a_head = static_cast<uint32_t>(params.seqlen_q) * group_size;
  const uint32_t head_index = blockIdx.x / rows_a_head;
  const int row = static_cast<int>(blockIdx.x % rows_a_head);
  const int64_t batch = head_index / static_cast<uint32_t>(params.num_heads_k);
  const int head_k = static_cast<int>(head_index % static_cast<uint32_t>(params.num_heads_k));
  const Sequence sequence = sequence_at(params, batch);
  wait_for_previous_kernel();  // the parts
  if (row >= sequence.seqlen_q * group_size) return;

  const int thread = static_cast<int>(threadIdx.x), warp = warp_id(), lane = lane_id();
  const int num_splits = static_cast<int>(args.num_splits);
  PartialRow part = {-kInfinity, 0.0f};
  if (thread < num_splits) part = args.partial_rows[thread * args.num_rows + blockIdx.x];

  // The outputs of a warp's first parts come at the same time as the sums.
  constexpr int kQuads = spec.head_dim / 4, kAhead = 4, kTurns = (kQuads + 31) / 32;
  const int64_t split_stride = args.num_rows * spec.head_dim;
  const float* parts = args.partial_out + blockIdx.x * int64_t{spec.head_dim} + 4 * lane;
  const auto load = [&](int split, int turn) {
    return split < num_splits && lane + 32 * turn < kQuads
               ? *reinterpret_cast<const float4*>(parts + split * split_stride + 128 * turn)
               : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  };
  float4 ahead[kAhead][kTurns];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) ahead[i][turn] = load(warp + i * spec.warps(), turn);
  }

  const float warp_top = warp_max(part.top);
  if (lane == 0) of_warp[warp].top = warp_top;
  __syncthreads();
  PartialRow whole = {-kInfinity, 0.0f};
#pragma unroll
  for (int w = 0; w < spec.warps(); ++w) whole.top = fmaxf(whole.top, of_warp[w].top);
  const float weight = part.sum == 0.0f ? 0.0f : part_weight(part, whole.top);
  weights[thread] = weight;
  const float warp_part = warp_sum(weight * part.sum);
  if (lane == 0) of_warp[warp].sum = warp_part;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < spec.warps(); ++w) whole.sum += of_warp[w].sum;

  float4 sum[kTurns] = {};
  const auto add = [&](int split, int turn, float4 y) {
    const float w = split < num_splits ? weights[split] : 0.0f;
    if (w == 0.0f) return;  // lost beside the others; NaN is not 0
    sum[turn].x = fmaf(y.x, w, sum[turn].x);
    sum[turn].y = fmaf(y.y, w, sum[turn].y);
    sum[turn].z = fmaf(y.z, w, sum[turn].z);
    sum[turn].w = fmaf(y.w, w, sum[turn].w);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) add(warp + i * spec.warps(), turn, ahead[i][turn]);
  }
  for (int s = warp + kAhead * spec.warps(); s < num_splits; s += spec.warps()) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) add(s, turn, load(s, turn));
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int quad = lane + 32 * turn;
    if (quad < kQuads) *reinterpret_cast<float4*>(&sums[warp][4 * quad]) = sum[turn];
  }
  __syncthreads();

  const PackedRow packed(row, group_size, head_k);
  const int64_t query = sequence.q_begin + packed.query;
  float factor;
  const float lse = finish_row(whole, sink_of(params, packed.head), &factor);
  if (thread == 0) params.softmax_lse.set(batch, packed.head, query, lse);
  if (thread >= kQuads) return;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int w = 0; w < spec.warps(); ++w) {
    const float4 y = *reinterpret_cast<const float4*>(&sums[w][4 * thread]);
    x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  }
  uint16_t* out = static_cast<uint16_t*>(params.out.data) + batch * params.out.batch_stride +
                  query * params.out.row_stride + packed.head * params.out.head_stride;
  store_columns<spec.dtype, spec.access>(
      out, 4 * thread, static_cast<int>(params.head_dim),
      make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor));
}

}  // namespace flash_attn_plus::cuda
