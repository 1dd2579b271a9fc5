// Rotary embedding of a whole tensor.
//
// A block of threads has some rows of one sequence; its threads take units of 16 bytes of all heads
// of a row side by side, so that reads are contiguous and the tables of a row come from the
// first-level cache for all heads but one. Bound by memory.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/rotary.cuh"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {

using RowNumber = Number<spec.dtype>;
using TableNumber = Number<spec.table_dtype>;

FAP_DEVICE int64_t first_position(const RotaryParams& params, int64_t batch) {
  if (params.seqlen_offsets32 != nullptr) return params.seqlen_offsets32[batch];
  if (params.seqlen_offsets64 != nullptr) return params.seqlen_offsets64[batch];
  return params.seqlen_offset;
}

// Rows that belong to no sequence have no position: they stay as they are. Shared by all blocks.
FAP_DEVICE void copy_unused_rows(const RotaryParams& params) {
  if (params.cu_seqlens == nullptr || params.out.data == params.x.data) return;
  const int64_t begin = clamped(params.cu_seqlens[params.batch], params.total_rows);
  const uint32_t units = static_cast<uint32_t>(params.head_dim / spec.width());
  const uint32_t num_heads = static_cast<uint32_t>(params.num_heads);
  for (int64_t row = begin + blockIdx.x; row < params.total_rows; row += gridDim.x) {
    for (uint32_t i = threadIdx.x; i < num_heads * units; i += kRowThreads) {
      const uint32_t head = i / units;
      copy_unit<spec.dtype, spec.width()>(
          static_cast<const RowNumber*>(params.x.data) + row * params.x.row_stride +
              head * params.x.head_stride,
          static_cast<RowNumber*>(params.out.data) + row * params.out.row_stride +
              head * params.out.head_stride,
          i % units);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kRowThreads)
    rotary_embedding(const __grid_constant__ RotaryArgs args) {
  const RotaryParams& params = args.params;
  copy_unused_rows(params);
  const int64_t batch = blockIdx.x / args.blocks_per_sequence;
  if (batch >= params.batch) return;
  int64_t first = 0, seqlen = params.seqlen;
  if (params.cu_seqlens != nullptr) {
    first = clamped(params.cu_seqlens[batch], params.total_rows);
    seqlen = clamped(params.cu_seqlens[batch + 1] - first,
                     min_of(params.seqlen, params.total_rows - first));
  }
  const int64_t begin =
      static_cast<int64_t>(blockIdx.x % args.blocks_per_sequence) * args.rows_per_block;
  const int64_t num_rows = min_of<int64_t>(args.rows_per_block, seqlen - begin);
  if (num_rows <= 0) return;

  const uint32_t units = row_units(spec.width(), params.rotary_dim, params.head_dim);
  const uint32_t row_work = units * static_cast<uint32_t>(params.num_heads);
  const int64_t position = first_position(params, batch) + begin;
  for (uint32_t i = threadIdx.x; i < row_work * static_cast<uint32_t>(num_rows); i += kRowThreads) {
    const uint32_t row = i / row_work;
    const uint32_t head = i % row_work / units;
    const int64_t at = first + begin + row;
    // Positions outside the tables, which only lengths on the device can have, do not rotate.
    const bool known = position + row >= 0 && position + row < params.num_positions;
    const TableNumber* cos = static_cast<const TableNumber*>(params.cos);
    const TableNumber* sin = static_cast<const TableNumber*>(params.sin);
    rotate_unit<spec.dtype, spec.table_dtype, spec.width(), spec.interleaved>(
        static_cast<const RowNumber*>(params.x.data) + batch * params.x.batch_stride +
            at * params.x.row_stride + head * params.x.head_stride,
        static_cast<RowNumber*>(params.out.data) + batch * params.out.batch_stride +
            at * params.out.row_stride + head * params.out.head_stride,
        known ? cos + (position + row) * params.cos_stride : nullptr,
        known ? sin + (position + row) * params.sin_stride : nullptr, i % units,
        static_cast<int>(params.rotary_dim), params.conjugate);
  }
}

}  // namespace flash_attn_plus::cuda
