// dq from the accumulator of the main backward kernel: tile_m rows of one head, scaled, rounded,
// and brought from the order of mma()'s fragments into rows by way of shared memory. Bound by
// memory.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/sm80/backward_products.cuh"

namespace flash_attn_plus::cuda {

extern "C" __global__ void __launch_bounds__(spec.threads())
    attention_backward_convert(const __grid_constant__ BackwardArgs args) {
  extern __shared__ uint4 shared_memory[];
  using Rows = Tile<spec.tile_m, spec.head_dim>;
  const Rows tile{shared_address(shared_memory)};
  const BackwardParams& params = args.params;
  const uint32_t pair = blockIdx.x / args.num_query_blocks;
  const int first_row = static_cast<int>(blockIdx.x % args.num_query_blocks) * spec.tile_m;
  const int64_t batch = pair / static_cast<uint32_t>(params.num_heads);
  const int64_t head = pair % static_cast<uint32_t>(params.num_heads);
  const Sequence sequence = sequence_at(params, batch);
  const int rows = static_cast<int>(sequence.seqlen_q) - first_row;
  if (rows <= 0) return;

  const int64_t block_number = args.first_accumulator_block(batch, sequence.q_begin) +
                               head * args.blocks_per_head + first_row / spec.tile_m;
  const float* block = args.accumulator + block_number * (spec.tile_m * spec.head_dim);
  constexpr int kRow16 = spec.tile_m / 16, kCol8 = spec.head_dim / 8;
  const int warp = warp_id(), lane = lane_id();
#pragma unroll 4
  for (int fragment = warp; fragment < kRow16 * kCol8; fragment += spec.threads() / 32) {
    const int row16 = fragment / kCol8, col8 = fragment % kCol8;
    float x[4];
    if constexpr (spec.vector_add) {
      const float4 vector = *reinterpret_cast<const float4*>(
          block + accumulator_index(true, spec.head_dim, row16, col8, lane, 0));
      x[0] = vector.x, x[1] = vector.y, x[2] = vector.z, x[3] = vector.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = block[accumulator_index(false, spec.head_dim, row16, col8, lane, i)];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      store_shared(tile.at(16 * row16 + 8 * half + lane / 4, 8 * col8 + lane % 4 * 2),
                   pack2<spec.dtype>(x[2 * half] * params.softmax_scale,
                                     x[2 * half + 1] * params.softmax_scale));
    }
  }
  __syncthreads();
  uint16_t* target = static_cast<uint16_t*>(params.dq.data) + batch * params.dq.batch_stride +
                     (sequence.q_begin + first_row) * params.dq.row_stride +
                     head * params.dq.head_stride;
  store_rows<spec.access, spec.threads()>(tile, static_cast<int>(threadIdx.x),
                                          static_cast<int>(params.head_dim), target,
                                          params.dq.row_stride, rows);
}

}  // namespace flash_attn_plus::cuda
