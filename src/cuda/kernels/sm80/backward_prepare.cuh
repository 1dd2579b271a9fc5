// What precedes the main backward kernel: D = rowsum(dO * O) - dlse of every query row, zeros in
// the accumulator of dQ and its counters, and zeros in gradients of rows that belong to no
// sequence.
//
// A block of threads takes kRows rows of one head, eight lanes a row, and its share of the
// workspace. It moves bytes and nothing else, and is bound by memory.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/ptx.cuh"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

constexpr int kLanesPerRow = 8;

// Part of dO . O: 8 products. An entry of O that is 0 counts 0 whatever dO is there: a row that
// sees nothing has no gradient.
FAP_DEVICE float dot8(const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float dout[2], out[2];
    unpack2<spec.dtype>(a[i], dout[0], dout[1]);
    unpack2<spec.dtype>(b[i], out[0], out[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) sum = out[j] == 0.0f ? sum : fmaf(dout[j], out[j], sum);
  }
  return sum;
}

FAP_DEVICE void load8(uint32_t (&x)[4], const uint16_t* source, int col, int head_dim) {
  if constexpr (spec.access == Access::kElement) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = col + 2 * i < head_dim ? source[2 * i] : 0;
      const uint32_t high = col + 2 * i + 1 < head_dim ? source[2 * i + 1] : 0;
      x[i] = low | high << 16;
    }
  } else {
    uint4 words{0, 0, 0, 0};
    if (col < head_dim) words = *reinterpret_cast<const uint4*>(source);
    x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w;
  }
}

FAP_DEVICE void zero_row(uint16_t* row, int lane, int head_dim) {
  for (int i = lane; i < head_dim; i += kLanesPerRow) row[i] = 0;
}

FAP_DEVICE uint16_t* row_of(const Operand& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<uint16_t*>(x.data) + batch * x.batch_stride + row * x.row_stride +
         head * x.head_stride;
}

// Tokens [begin, end) of a packed axis belong to sequences.
struct Tokens {
  int64_t begin, end;
  FAP_DEVICE Tokens(const int32_t* cu_seqlens, int64_t batch, int64_t total)
      : begin(cu_seqlens == nullptr ? 0 : clamped(cu_seqlens[0], total)),
        end(cu_seqlens == nullptr ? total : clamped(cu_seqlens[batch], total)) {}
  FAP_DEVICE bool contains(int64_t token) const { return begin <= token && token < end; }
};

extern "C" __global__ void __launch_bounds__(spec.threads())
    attention_backward_prepare(const __grid_constant__ BackwardArgs args) {
  const BackwardParams& params = args.params;
  const int thread = static_cast<int>(threadIdx.x);
  const int head_dim = static_cast<int>(params.head_dim);

  uint4* workspace = reinterpret_cast<uint4*>(args.accumulator);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(spec.threads()) + thread;
       i < args.workspace_chunks; i += gridDim.x * static_cast<int64_t>(spec.threads())) {
    workspace[i] = {0, 0, 0, 0};
  }

  const int first_row = thread / kLanesPerRow, lane = thread % kLanesPerRow;
  constexpr int kRowsAtOnce = spec.threads() / kLanesPerRow;
  if (blockIdx.x < args.num_prepare_blocks) {
    const bool packed = params.cu_seqlens_q != nullptr;
    const int64_t num_rows = packed ? params.total_q : params.seqlen_q;
    const Tokens tokens(params.cu_seqlens_q, params.batch, num_rows);
    const uint32_t pair = blockIdx.x / args.num_row_blocks;
    const int64_t begin = static_cast<int64_t>(blockIdx.x % args.num_row_blocks) * spec.kRows;
    const int64_t batch = pair / static_cast<uint32_t>(params.num_heads);
    const int64_t head = pair % static_cast<uint32_t>(params.num_heads);
#pragma unroll
    for (int r = 0; r < spec.kRows; r += kRowsAtOnce) {
      const int64_t row = begin + r + first_row;
      const bool valid = row < num_rows && tokens.contains(row);
      float sum = 0.0f;
      if (valid) {
        const uint16_t* dout = row_of(params.dout, batch, head, row);
        const uint16_t* out = row_of(params.out, batch, head, row);
#pragma unroll
        for (int chunk = 0; chunk < spec.head_dim / 8; chunk += kLanesPerRow) {
          const int col = (chunk + lane) * 8;
          uint32_t a[4], b[4];
          if (spec.head_dim / 8 % kLanesPerRow != 0 && col >= spec.head_dim) break;
          load8(a, dout + col, col, head_dim);
          load8(b, out + col, col, head_dim);
          sum += dot8(a, b);
        }
      } else if (row < num_rows) {
        zero_row(row_of(params.dq, batch, head, row), lane, head_dim);
      }
#pragma unroll
      for (int distance = 1; distance < kLanesPerRow; distance *= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
      }
      if (lane == 0 && row < num_rows) {
        if (valid && params.dsoftmax_lse.data != nullptr) {
          sum -= params.dsoftmax_lse.data[batch * params.dsoftmax_lse.batch_stride +
                                          head * params.dsoftmax_lse.head_stride +
                                          row * params.dsoftmax_lse.row_stride];
        }
        params.softmax_d.set(batch, head, row, sum);
      }
    }
  } else {
    const Tokens tokens(params.cu_seqlens_k, params.batch, params.total_k);
    const int64_t begin = static_cast<int64_t>(blockIdx.x - args.num_prepare_blocks) * spec.kRows;
    for (int r = first_row; r < spec.kRows; r += kRowsAtOnce) {
      const int64_t row = begin + r;
      if (row >= params.total_k || tokens.contains(row)) continue;
      for (int64_t head = 0; head < params.num_heads_k; ++head) {
        zero_row(row_of(params.dk, 0, head, row), lane, head_dim);
        zero_row(row_of(params.dv, 0, head, row), lane, head_dim);
      }
    }
  }
}

}  // namespace flash_attn_plus::cuda
