// Rotary embedding of a whole tensor, in parallel over blocks of rows.
#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu {
namespace {

// Of the first row of a sequence.
int64_t first_position(const RotaryParams& params, int64_t batch) {
  if (params.seqlen_offsets32 != nullptr) return params.seqlen_offsets32[batch];
  if (params.seqlen_offsets64 != nullptr) return params.seqlen_offsets64[batch];
  return params.seqlen_offset;
}

// Rows that belong to no sequence have no position: they stay as they are.
void copy_unused_rows(const RotaryParams& params) {
  if (params.cu_seqlens == nullptr || params.out.data == params.x.data) return;
  const int64_t size = element_size(params.dtype);
  for (int64_t row = params.cu_seqlens[params.batch]; row < params.total_rows; ++row) {
    const auto* x = static_cast<const char*>(row_at(params.x, size, 0, row));
    auto* out = static_cast<char*>(row_at(params.out, size, 0, row));
    for (int64_t head = 0; head < params.num_heads; ++head) {
      std::memcpy(out + head * params.out.head_stride * size,
                  x + head * params.x.head_stride * size,
                  static_cast<size_t>(params.head_dim * size));
    }
  }
}

}  // namespace

void rotary(const RotaryParams& params) {
  const int64_t size = element_size(params.dtype);
  const int64_t row_bytes = params.num_heads * params.head_dim * size;
  const int64_t block_rows = rows_per_task(row_bytes);
  const int64_t blocks = (params.seqlen + block_rows - 1) / block_rows;
  const int num_threads = threads_for(params.num_threads, params.batch * params.seqlen * row_bytes);
  parallel_for(num_threads, params.batch * blocks, [&](int64_t index, int) {
    const int64_t batch = index / blocks;
    const int64_t begin = (index % blocks) * block_rows;
    int64_t first = 0, seqlen = params.seqlen;
    if (params.cu_seqlens != nullptr) {
      first = params.cu_seqlens[batch];
      seqlen = params.cu_seqlens[batch + 1] - first;
    }
    // Validated to lie inside the tables; the clamp keeps a table from being overrun all the same.
    const int64_t position = first_position(params, batch) + begin;
    const int64_t end = std::min({begin + block_rows, seqlen,
                                  begin + std::max<int64_t>(0, params.num_positions - position)});
    if (begin >= end || position < 0) return;

    RotaryRows rows;
    rows.dtype = params.dtype;
    rows.table_dtype = params.table_dtype;
    rows.num_rows = end - begin;
    rows.num_heads = params.num_heads;
    rows.head_dim = params.head_dim;
    rows.x = row_at(params.x, size, batch, first + begin);
    rows.x_row_stride = params.x.row_stride;
    rows.x_head_stride = params.x.head_stride;
    rows.out = row_at(params.out, size, batch, first + begin);
    rows.out_row_stride = params.out.row_stride;
    rows.out_head_stride = params.out.head_stride;
    const int64_t table_size = element_size(params.table_dtype);
    rows.cos = offset_by(params.cos, position * params.cos_stride * table_size);
    rows.sin = offset_by(params.sin, position * params.sin_stride * table_size);
    rows.cos_stride = params.cos_stride;
    rows.sin_stride = params.sin_stride;
    rows.rotary_dim = params.rotary_dim;
    rows.interleaved = params.interleaved;
    rows.conjugate = params.conjugate;
    selected_kernels().rotate(rows);
  });
  copy_unused_rows(params);
}

}  // namespace flash_attn_plus::cpu
