// Appends new keys and values to a cache and rotates the queries that will meet them.
#include <algorithm>
#include <cstring>

#include "attention/mask.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu {
namespace {

int64_t length(const AppendParams& params, int64_t batch) { return params.cache_seqlens[batch]; }

// Head 0 of a row of a sequence's cache.
void* cache_row(const AppendParams& params, const Operand& cache, int64_t size, int64_t batch,
                int64_t row) {
  if (params.block_table != nullptr) {
    const int64_t page =
        params.block_table[batch * params.block_table_stride + row / params.page_size];
    return row_at(cache, size, page, row % params.page_size);
  }
  return row_at(cache, size,
                params.cache_batch_idx != nullptr ? params.cache_batch_idx[batch] : batch, row);
}

void copy_row(const AppendParams& params, int64_t size, const void* x, int64_t x_head_stride,
              void* out, int64_t out_head_stride) {
  for (int64_t head = 0; head < params.num_heads_k; ++head) {
    std::memcpy(static_cast<char*>(out) + head * out_head_stride * size,
                static_cast<const char*>(x) + head * x_head_stride * size,
                static_cast<size_t>(params.head_dim * size));
  }
}

// Rows of x at `position` and on: one row each if `advances`, all at the same one otherwise.
RotaryRows rotary_rows(const AppendParams& params, int64_t size, int64_t position, bool advances) {
  RotaryRows rows;
  rows.dtype = params.dtype;
  rows.table_dtype = params.dtype;
  rows.head_dim = params.head_dim;
  rows.cos = offset_by(params.rotary_cos, position * params.rotary_cos_stride * size);
  rows.sin = offset_by(params.rotary_sin, position * params.rotary_sin_stride * size);
  rows.cos_stride = advances ? params.rotary_cos_stride : 0;
  rows.sin_stride = advances ? params.rotary_sin_stride : 0;
  rows.rotary_dim = params.rotary_dim;
  rows.interleaved = params.rotary_interleaved;
  return rows;
}

void append_rows(const AppendParams& params, int64_t batch, Range rows) {
  const int64_t size = element_size(params.dtype);
  const int64_t begin = length(params, batch);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const void* k = row_at(params.k, size, batch, row);
    void* k_cache = cache_row(params, params.k_cache, size, batch, begin + row);
    if (params.rotary_cos != nullptr) {
      RotaryRows one = rotary_rows(params, size, begin + row, true);
      one.num_rows = 1;
      one.num_heads = params.num_heads_k;
      one.x = k;
      one.x_head_stride = params.k.head_stride;
      one.out = k_cache;
      one.out_head_stride = params.k_cache.head_stride;
      selected_kernels().rotate(one);
    } else {
      copy_row(params, size, k, params.k.head_stride, k_cache, params.k_cache.head_stride);
    }
    copy_row(params, size, row_at(params.v, size, batch, row), params.v.head_stride,
             cache_row(params, params.v_cache, size, batch, begin + row),
             params.v_cache.head_stride);
  }
}

void rotate_queries(const AppendParams& params, int64_t batch, Range range) {
  const int64_t size = element_size(params.dtype);
  const int64_t position =
      length(params, batch) + (params.rotate_q_by_row ? range.begin : int64_t{0});
  RotaryRows rows = rotary_rows(params, size, position, params.rotate_q_by_row);
  rows.num_rows = range.size();
  rows.num_heads = params.num_heads;
  rows.x = row_at(params.q, size, batch, range.begin);
  rows.x_row_stride = params.q.row_stride;
  rows.x_head_stride = params.q.head_stride;
  rows.out = row_at(params.q_rotated, size, batch, range.begin);
  rows.out_row_stride = params.q_rotated.row_stride;
  rows.out_head_stride = params.q_rotated.head_stride;
  selected_kernels().rotate(rows);
}

}  // namespace

void append(const AppendParams& params) {
  const int64_t size = element_size(params.dtype);
  const int64_t new_bytes = 2 * params.num_heads_k * params.head_dim * size;
  const int64_t q_bytes = params.num_heads * params.head_dim * size;
  const int64_t seqlen_q =
      params.rotary_cos != nullptr && params.q_rotated.data != nullptr ? params.seqlen_q : 0;
  const int64_t new_block = rows_per_task(new_bytes), q_block = rows_per_task(q_bytes);
  const int64_t new_blocks = (params.seqlen_new + new_block - 1) / new_block;
  const int64_t blocks = new_blocks + (seqlen_q + q_block - 1) / q_block;
  const int num_threads = threads_for(
      params.num_threads, params.batch * (params.seqlen_new * new_bytes + seqlen_q * q_bytes));
  parallel_for(num_threads, params.batch * blocks, [&](int64_t index, int) {
    const int64_t batch = index / blocks, block = index % blocks;
    if (block < new_blocks) {
      const int64_t begin = block * new_block;
      append_rows(params, batch, {begin, std::min(begin + new_block, params.seqlen_new)});
    } else {
      const int64_t begin = (block - new_blocks) * q_block;
      rotate_queries(params, batch, {begin, std::min(begin + q_block, seqlen_q)});
    }
  });
}

}  // namespace flash_attn_plus::cpu
