// Parts of a row's softmax, by warp and by split, and the row that they make.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/ptx.cuh"
#include "cuda/spec/decode.h"

namespace flash_attn_plus::cuda {

// The query heads that share a key head are packed: packed row r is query r / group_size of head
// r % group_size of its group.
struct PackedRow {
  int query;
  int head;

  FAP_DEVICE PackedRow(int row, int group_size, int head_k)
      : query(row / group_size), head(head_k * group_size + row % group_size) {}
};

// What the output of a part counts in a row whose parts reach up to `top`.
FAP_DEVICE float part_weight(PartialRow part, float top) {
  return exp2_approx(part.top - (top == -kInfinity ? 0.0f : top));
}

// The head's sink in units of log2; -inf when there is none.
FAP_DEVICE float sink_of(const AttentionParams& params, int head) {
  return params.s_aux == nullptr ? -kInfinity : params.s_aux[head * params.s_aux_stride] * kLog2E;
}

// The log-sum-exp of a whole row, and what its output is to be multiplied by.
FAP_DEVICE float finish_row(PartialRow row, float sink, float* factor) {
  if (row.sum == 0.0f) {  // no key
    *factor = 0.0f;
    return sink == -kInfinity ? kInfinity : sink * kLn2;
  }
  // Relative to the larger of the two, so that neither overflows.
  const float top = fmaxf(row.top, sink);
  const float keys = exp2_approx(row.top - top);
  const float total = row.sum * keys + (sink == -kInfinity ? 0.0f : exp2_approx(sink - top));
  *factor = keys / total;
  return top == kInfinity ? top : (top + log2_approx(total)) * kLn2;
}

// Writes columns col .. col + 3 of a row of the output.
template <DType kType, Access kAccess>
FAP_DEVICE void store_columns(uint16_t* row, int col, int head_dim, float4 x) {
  if constexpr (kAccess == Access::kElement) {
    if (col < head_dim) row[col] = pack1<kType>(x.x);
    if (col + 1 < head_dim) row[col + 1] = pack1<kType>(x.y);
    if (col + 2 < head_dim) row[col + 2] = pack1<kType>(x.z);
    if (col + 3 < head_dim) row[col + 3] = pack1<kType>(x.w);
  } else if (kAccess == Access::kWhole || col < head_dim) {
    *reinterpret_cast<uint2*>(row + col) =
        make_uint2(pack2<kType>(x.x, x.y), pack2<kType>(x.z, x.w));
  }
}

// Rows of q that belong to no sequence: output 0, log-sum-exp +inf. Shared by all blocks
// of threads of the grid.
FAP_DEVICE void fill_unused_rows(const ForwardParams& params) {
  if (params.cu_seqlens_q == nullptr) return;
  const int64_t begin = clamped(params.cu_seqlens_q[params.batch], params.total_q);
  for (int64_t row = begin + blockIdx.x; row < params.total_q; row += gridDim.x) {
    for (int head = 0; head < params.num_heads; ++head) {
      uint16_t* out = static_cast<uint16_t*>(params.out.data) + row * params.out.row_stride +
                      head * params.out.head_stride;
      for (int col = threadIdx.x; col < params.head_dim; col += blockDim.x) out[col] = 0;
      if (threadIdx.x == 0) params.softmax_lse.set(0, head, row, kInfinity);
    }
  }
}

}  // namespace flash_attn_plus::cuda
