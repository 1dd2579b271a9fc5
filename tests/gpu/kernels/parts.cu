// What cuda/kernels/parts.cuh makes of the parts of a row.
//
// DType kType and Access kAccess: of the output.
#include "cuda/kernels/parts.cuh"

namespace flash_attn_plus::cuda {

// Of n rows: maximum and sum of the exponentials, maximum of all parts, sink; all in log2.
extern "C" __global__ void finished(const float* tops, const float* sums, const float* most,
                                    const float* sinks, float* weights, float* lse, float* factors,
                                    int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const PartialRow row{tops[i], sums[i]};
  weights[i] = part_weight(row, most[i]);
  lse[i] = finish_row(row, sinks[i], factors + i);
}

extern "C" __global__ void packed_rows(int32_t* queries, int32_t* heads, int64_t group_size,
                                       int64_t head_k) {
  const PackedRow row(static_cast<int>(threadIdx.x), static_cast<int>(group_size),
                      static_cast<int>(head_k));
  queries[threadIdx.x] = row.query;
  heads[threadIdx.x] = row.head;
}

// One block of threads for each row; x (rows, cols), cols a multiple of 4.
extern "C" __global__ void stored(const float* x, uint16_t* out, int64_t cols, int64_t row_stride,
                                  int64_t head_dim) {
  for (int col = 4 * threadIdx.x; col < cols; col += 4 * blockDim.x) {
    const float* source = x + blockIdx.x * cols + col;
    store_columns<kType, kAccess>(out + blockIdx.x * row_stride, col, static_cast<int>(head_dim),
                                  make_float4(source[0], source[1], source[2], source[3]));
  }
}

// out (total, heads, head_dim), lse (heads, total), sinks (heads).
extern "C" __global__ void unused_rows(const int32_t* cu_seqlens_q, uint16_t* out, float* lse,
                                       const float* sinks, int64_t batch, int64_t total,
                                       int64_t heads, int64_t head_dim) {
  ForwardParams params;
  params.cu_seqlens_q = cu_seqlens_q;
  params.batch = batch;
  params.total_q = total;
  params.num_heads = heads;
  params.head_dim = head_dim;
  params.out.data = out;
  params.out.row_stride = heads * head_dim;
  params.out.head_stride = head_dim;
  params.softmax_lse.data = lse;
  params.softmax_lse.head_stride = total;
  params.s_aux = sinks;
  params.s_aux_stride = 1;
  fill_unused_rows(params);
}

}  // namespace flash_attn_plus::cuda
