// Appends new keys and values to a cache, rotated on the way, and rotates the queries that will
// meet them. What the lengths and tables on the device say is checked: no row is written that is
// not in the sequence's own cache. Bound by latency: there are few rows.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/rotary.cuh"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {

using RowNumber = Number<spec.dtype>;

// Head 0 of a row of a sequence's cache; null when there is no such row.
FAP_DEVICE RowNumber* cache_row(const AppendParams& params, const Operand& cache, int64_t batch,
                                int64_t row) {
  if (row < 0 || row >= params.capacity) return nullptr;
  RowNumber* data = static_cast<RowNumber*>(cache.data);
  if (params.block_table != nullptr) {
    const int64_t page =
        params.block_table[batch * params.block_table_stride + row / params.page_size];
    if (page < 0 || page >= params.num_pages) return nullptr;
    return data + page * cache.batch_stride + row % params.page_size * cache.row_stride;
  }
  if (params.cache_batch_idx != nullptr) {
    batch = params.cache_batch_idx[batch];
    if (batch < 0 || batch >= params.cache_rows) return nullptr;
  }
  return data + batch * cache.batch_stride + row * cache.row_stride;
}

// One unit of a row, rotated at `position`.
FAP_DEVICE void rotate_at(const AppendParams& params, const RowNumber* x, RowNumber* out,
                          int64_t position, uint32_t unit) {
  // Positions outside the tables, which only lengths on the device can have, do not rotate.
  const bool known = position >= 0 && position < params.num_positions;
  const RowNumber* cos = static_cast<const RowNumber*>(params.rotary_cos);
  const RowNumber* sin = static_cast<const RowNumber*>(params.rotary_sin);
  rotate_unit<spec.dtype, spec.dtype, spec.width(), spec.interleaved>(
      x, out, known ? cos + position * params.rotary_cos_stride : nullptr,
      known ? sin + position * params.rotary_sin_stride : nullptr, unit,
      static_cast<int>(params.rotary_dim), false);
}

// Rows begin .. of the new keys or values go to the cache.
template <bool kRotates>
FAP_DEVICE void append_rows(const AppendArgs& args, const Operand& x, const Operand& cache,
                            int64_t batch, int64_t begin) {
  const AppendParams& params = args.params;
  const int64_t num_rows = min_of<int64_t>(args.new_rows_per_block, params.seqlen_new - begin);
  const uint32_t units = row_units(spec.width(), kRotates ? params.rotary_dim : 0, params.head_dim);
  const uint32_t row_work = units * static_cast<uint32_t>(params.num_heads_k);
  const int64_t length = params.cache_seqlens[batch];
  for (uint32_t i = threadIdx.x; i < row_work * static_cast<uint32_t>(num_rows); i += kRowThreads) {
    const int64_t row = begin + i / row_work;
    const uint32_t head = i % row_work / units;
    const RowNumber* source = static_cast<const RowNumber*>(x.data) + batch * x.batch_stride +
                              row * x.row_stride + head * x.head_stride;
    RowNumber* out = cache_row(params, cache, batch, length + row);
    if (out == nullptr) continue;
    out += head * cache.head_stride;
    if constexpr (kRotates) {
      rotate_at(params, source, out, length + row, i % units);
    } else {
      copy_unit<spec.dtype, spec.width()>(source, out, i % units);
    }
  }
}

FAP_DEVICE void rotate_queries(const AppendArgs& args, int64_t batch, int64_t begin) {
  const AppendParams& params = args.params;
  const int64_t num_rows = min_of<int64_t>(args.q_rows_per_block, params.seqlen_q - begin);
  const uint32_t units = row_units(spec.width(), params.rotary_dim, params.head_dim);
  const uint32_t row_work = units * static_cast<uint32_t>(params.num_heads);
  const int64_t length = params.cache_seqlens[batch];
  for (uint32_t i = threadIdx.x; i < row_work * static_cast<uint32_t>(num_rows); i += kRowThreads) {
    const int64_t row = begin + i / row_work;
    const uint32_t head = i % row_work / units;
    rotate_at(params,
              static_cast<const RowNumber*>(params.q.data) + batch * params.q.batch_stride +
                  row * params.q.row_stride + head * params.q.head_stride,
              static_cast<RowNumber*>(params.q_rotated.data) +
                  batch * params.q_rotated.batch_stride + row * params.q_rotated.row_stride +
                  head * params.q_rotated.head_stride,
              length + (params.rotate_q_by_row ? row : 0), i % units);
  }
}

extern "C" __global__ void __launch_bounds__(kRowThreads)
    append_to_cache(const __grid_constant__ AppendArgs args) {
  const AppendParams& params = args.params;
  const uint32_t blocks = 2 * args.new_blocks + args.q_blocks;
  const int64_t batch = blockIdx.x / blocks;
  const int64_t block = blockIdx.x % blocks;
  if (block < args.new_blocks) {
    append_rows<spec.rotates>(args, params.k, params.k_cache, batch,
                              block * args.new_rows_per_block);
  } else if (block < 2 * args.new_blocks) {
    append_rows<false>(args, params.v, params.v_cache, batch,
                       (block - args.new_blocks) * args.new_rows_per_block);
  } else if constexpr (spec.rotates) {
    rotate_queries(args, batch, (block - 2 * args.new_blocks) * args.q_rows_per_block);
  }
}

}  // namespace flash_attn_plus::cuda
