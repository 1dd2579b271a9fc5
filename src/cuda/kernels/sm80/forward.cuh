// Attention forward with mma.sync, compute capability 8.0 and later.
//
// A block of threads computes tile_m rows of one query head. Every warp owns tile_m / num_warps
// rows for good: their part of Q (in shared memory, read by fragments at every step, or in
// registers), their scores, their softmax and their output, all in registers. Tiles of tile_n keys
// and values come to shared memory by cp.async and are read by all warps; they are visited from the
// last to the first, so that masked ones come first and the loop over the others has no mask. The
// weights need no shared memory: the accumulator of the first product is laid out as operand a of
// the second.
//
// A warp of 32 rows reads a tile of keys from shared memory once for two rows of fragments: with 16
// rows those reads, not the tensor cores, would set the pace. Two resident blocks give every
// scheduler two warps, one multiplying while the other is in its softmax.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/key_tiles.cuh"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/tile.cuh"
#include "cuda/spec/forward.h"

namespace flash_attn_plus::cuda {

constexpr int kRowsPerWarp = spec.tile_m / spec.num_warps;
constexpr int kM = kRowsPerWarp / 16;
constexpr int kN = spec.tile_n / 8;
constexpr int kD = spec.head_dim / 8;
// Slices of 16 columns of Q that are kept in registers, where any are; 16 would be some too many.
constexpr int kHeldSlices = spec.q_in_registers ? min_of(kD / 2, 15) : 0;
static_assert(kRowsPerWarp % 16 == 0 && kN % 4 == 0 && kD % 2 == 0);
static_assert(spec.stages == 1 || spec.stages == 2);

using QTile = Tile<spec.tile_m, spec.head_dim>;
using KTile = Tile<spec.tile_n, spec.head_dim>;
using Scores = Fragments<kM, kN>;
using Output = Fragments<kM, kD>;

// Operands of the products of one warp.
struct Products {
  QTile q_tile;
  int row;  // the warp's first row of the tile
  uint32_t q[kM][max_of(kHeldSlices, 1)][4];

  FAP_DEVICE void load_q() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int d = 0; d < kHeldSlices; ++d) load_a(q[m][d], q_tile, row + 16 * m, 16 * d);
    }
  }

  // s = Q K^T
  FAP_DEVICE void multiply_keys(Scores& s, KTile keys) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int d = 0; d < kD / 2; ++d) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        if (d < kHeldSlices) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[m][i] = q[m][d][i];
        } else {
          load_a(a[m], q_tile, row + 16 * m, 16 * d);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        load_b_rows(b, keys, 8 * n, 16 * d);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<spec.dtype>(s[m][n], a[m], b[0], b[1]);
          mma<spec.dtype>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // out += P V
  FAP_DEVICE void multiply_values(Output& out, const Scores& p, KTile values) const {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        a[m][0] = pack2<spec.dtype>(p[m][n][0], p[m][n][1]);
        a[m][1] = pack2<spec.dtype>(p[m][n][2], p[m][n][3]);
        a[m][2] = pack2<spec.dtype>(p[m][n + 1][0], p[m][n + 1][1]);
        a[m][3] = pack2<spec.dtype>(p[m][n + 1][2], p[m][n + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < kD; d += 2) {
        uint32_t b[4];
        load_b_cols(b, values, 8 * n, 8 * d);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<spec.dtype>(out[m][d], a[m], b[0], b[1]);
          mma<spec.dtype>(out[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// The tiles of keys that a block of rows visits, from `last` down to `first`.
struct KeySteps {
  int first, last;            // tiles that some row sees
  int free_first, free_last;  // tiles that all rows see whole: no mask
};

FAP_DEVICE KeySteps plan_steps(const Mask& mask, Range rows) {
  const Range any = mask.any_visible_keys(rows);
  const Range all = mask.all_visible_keys(rows);
  KeySteps steps;
  steps.first = static_cast<int>(any.begin / spec.tile_n);
  steps.last = any.empty() ? steps.first - 1 : static_cast<int>((any.end - 1) / spec.tile_n);
  steps.free_first = steps.first;  // without a bound on the left
  if constexpr (spec.masking == Masking::kWindow) {
    steps.free_first =
        max(steps.first, static_cast<int>((all.begin + spec.tile_n - 1) / spec.tile_n));
  }
  steps.free_last = static_cast<int>(all.end / spec.tile_n) - 1;
  return steps;
}

// Rows that belong to no sequence: out 0, log-sum-exp +inf.
FAP_DEVICE void fill_rows_of_no_sequence(const ForwardArgs& args, uint32_t block,
                                         uint32_t num_blocks) {
  const ForwardParams& params = args.params;
  const int64_t begin = clamped(params.cu_seqlens_q[params.batch], params.total_q);
  for (int64_t row = begin + block; row < params.total_q; row += num_blocks) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      uint16_t* out = static_cast<uint16_t*>(params.out.data) + row * params.out.row_stride +
                      head * params.out.head_stride;
      for (int64_t d = threadIdx.x; d < params.head_dim; d += spec.threads()) out[d] = 0;
      if (threadIdx.x == 0) params.softmax_lse.set(0, head, row, kInfinity);
    }
  }
}

// Writes the warp's rows through its part of the tile of Q, which nobody else reads: every thread
// then stores 16 bytes of a row.
FAP_DEVICE void store_output(const Output& out, const ForwardParams& params, QTile tile, int row,
                             uint16_t* first, int rows) {
  const int lane = lane_id();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_shared(tile.at(row + 16 * m + 8 * half + lane / 4, 8 * d + lane % 4 * 2),
                     pack2<spec.dtype>(out[m][d][2 * half], out[m][d][2 * half + 1]));
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kRowsPerWarp * QTile::kChunks;
  static_assert(kChunks % 32 == 0);
#pragma unroll
  for (int c = 0; c < kChunks; c += 32) {
    const int r = (c + lane) / QTile::kChunks, col = (c + lane) % QTile::kChunks * 8;
    if (r >= rows) continue;
    const uint4 x = load_shared16(tile.at(row + r, col));
    uint16_t* target = first + r * params.out.row_stride + col;
    if constexpr (spec.access == Access::kElement) {
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (col + i < params.head_dim) {
          target[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        }
      }
    } else if (spec.access == Access::kWhole || col < params.head_dim) {
      *reinterpret_cast<uint4*>(target) = x;
    }
  }
}

// Divides by the sums and writes the output and the log-sum-exp. Where they go is found again: kept
// from the start, it would take registers through the main loop.
FAP_DEVICE void finish(const ForwardArgs& args, OnlineSoftmax<kM>& softmax, Output& out,
                       float dropout_scale, QTile q_tile) {
  const ForwardParams& params = args.params;
  uint32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  const ForwardBlock block = args.block_at(index);
  const Sequence sequence = sequence_at(params, block.batch);
  const int seqlen_q = static_cast<int>(sequence.seqlen_q);
  const int tile_row = warp_id() * kRowsPerWarp;
  const int warp_row = static_cast<int>(block.row_block) * spec.tile_m + tile_row;
  const float sink = params.s_aux == nullptr
                         ? -kInfinity
                         : params.s_aux[block.head * params.s_aux_stride] * kLog2E;
  softmax.finish();
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    float inverse;
    const float lse = softmax.log2_sum(slot, sink, &inverse) * kLn2;
    const int row = warp_row + lane_id() / 4 + 8 * slot;
    if (lane_id() % 4 == 0 && row < seqlen_q) {
      params.softmax_lse.set(block.batch, block.head, sequence.q_begin + row, lse);
    }
    if constexpr (spec.dropout) inverse *= dropout_scale;
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      out[slot / 2][d][slot % 2 * 2] *= inverse;
      out[slot / 2][d][slot % 2 * 2 + 1] *= inverse;
    }
  }
  uint16_t* target =
      static_cast<uint16_t*>(params.out.data) + block.batch * params.out.batch_stride +
      (sequence.q_begin + warp_row) * params.out.row_stride + block.head * params.out.head_stride;
  store_output(out, params, q_tile, tile_row, target, seqlen_q - warp_row);
}

extern "C" __global__ void __launch_bounds__(spec.threads(), spec.min_blocks)
    attention_forward(const __grid_constant__ ForwardArgs args) {
  extern __shared__ __align__(128) uint4 shared[];
  const ForwardParams& params = args.params;
  if (blockIdx.x >= args.num_attention_blocks) {
    fill_rows_of_no_sequence(args, blockIdx.x - args.num_attention_blocks,
                             gridDim.x - args.num_attention_blocks);
    return;
  }

  const ForwardBlock block = args.block_at(blockIdx.x);
  const uint32_t batch = block.batch, head = block.head;
  const Sequence sequence = sequence_at(params, batch);
  const int first_row = static_cast<int>(block.row_block) * spec.tile_m;
  const uint32_t head_k = args.heads_per_key_head.quotient(head);
  const int seqlen_q = static_cast<int>(sequence.seqlen_q);
  const int seqlen_k = static_cast<int>(sequence.seqlen_k);
  if (first_row >= seqlen_q) return;

  const Mask mask = sequence.mask(params);
  const KeyBounds bounds(mask);
  const KeySteps steps = plan_steps(mask, {first_row, min_of(first_row + spec.tile_m, seqlen_q)});

  // Shared memory: Q, then the buffers of keys, then those of values.
  const uint32_t base = shared_address(shared);
  const QTile q_tile{base};
  const auto key_tile = [&](int step) {
    return KTile{base + QTile::kBytes + step % spec.stages * KTile::kBytes};
  };
  const auto value_tile = [&](int step) {
    return KTile{base + QTile::kBytes + (spec.stages + step % spec.stages) * KTile::kBytes};
  };

  const int thread = static_cast<int>(threadIdx.x);
  const int head_dim = static_cast<int>(params.head_dim);
  const int last_column = steps.last * spec.tile_n;
  using Keys = KeyTiles<spec.paged, spec.access, spec.threads(), KTile>;
  Keys keys(params, params.k, sequence, batch, head_k, thread, last_column);
  Keys values(params, params.v, sequence, batch, head_k, thread, last_column);
  const auto load_keys = [&](int step, auto num_valid) {
    if (step >= steps.first) keys.copy_next(key_tile(step), thread, head_dim, num_valid);
    copy_async_commit();
  };
  const auto load_values = [&](int step, auto num_valid) {
    if (step >= steps.first) values.copy_next(value_tile(step), thread, head_dim, num_valid);
    copy_async_commit();
  };

  const uint16_t* q = static_cast<const uint16_t*>(params.q.data) + batch * params.q.batch_stride +
                      (sequence.q_begin + first_row) * params.q.row_stride +
                      head * params.q.head_stride;
  copy_rows<spec.access, spec.threads()>(q_tile, thread, head_dim, q, params.q.row_stride,
                                         seqlen_q - first_row);
  // Only the last tile can reach beyond the keys.
  load_keys(steps.last, seqlen_k - last_column);
  load_values(steps.last, seqlen_k - last_column);

  Products products;
  products.q_tile = q_tile;
  products.row = warp_id() * kRowsPerWarp;
  const int warp_row = first_row + products.row;
  const int thread_row = warp_row + lane_id() / 4;

  const ScoreTransform transform(params, spec.softcap, batch, head);
  // What is left for the exponent: with slopes alone they are divided by the scale beforehand.
  const float multiplier = spec.transformed() ? 1.0f
                           : spec.softcap     ? transform.softcap
                                              : transform.scale;
  const float slope = spec.transformed() ? transform.slope : transform.slope / transform.scale;
  Dropout dropout;
  if constexpr (spec.dropout) dropout = make_dropout(params);

  OnlineSoftmax<kM> softmax;
  Output out;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][d][i] = 0.0f;
    }
  }

  // From products to weights, and those times the values.
  const auto finish_step = [&](Scores& s, int step, auto score) {
    softmax.update(s, out, multiplier, score);
    if constexpr (spec.dropout) {
      drop_scores(s, dropout, batch, head, warp_row, step * spec.tile_n);
    }
    products.multiply_values(out, s, value_tile(step));
  };
  const auto weigh = [&](Scores& s, int step, auto masked) {
    const int column = step * spec.tile_n;
    // Beyond d = 64 this costs registers, and more than it brings.
    if constexpr (spec.softcap && !spec.alibi && !masked && spec.head_dim <= 64) {
      if (scale_to_tanh(s, transform.scale)) {
        finish_step(s, step, [](float x) { return tanh_of(x); });
      } else {
        finish_step(s, step, [](float x) { return tanh_near(x); });
      }
      return;
    }
    if constexpr (spec.softcap) tanh_scores(s, transform.scale);
    if constexpr (spec.transformed()) {
      scale_scores(s, spec.softcap ? transform.softcap : transform.scale);
    }
    if constexpr (spec.alibi) {
      bias_scores(s, slope, first_distance(thread_row + bounds.offset, column));
    }
    if constexpr (masked) mask_scores<spec.masking>(s, bounds, thread_row, column);
    finish_step(s, step, Itself{});
  };

  // With one buffer each, a tile is loaded when every warp has done with the one before it:
  // values under the first product, the next keys under the softmax and the second. With two,
  // both are loaded a step ahead.
  const auto take_step = [&](int step, auto masked) {
    const bool is_first = step == steps.last;
    // Keys of this step; with two buffers, values too.
    if (spec.stages == 1 && is_first) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if constexpr (spec.stages == 1) {
      if (!is_first) load_values(step, AllRows{});
    } else {
      load_keys(step - 1, AllRows{});
      load_values(step - 1, AllRows{});
    }
    if (is_first) products.load_q();
    // A masked step may concern other warps alone.
    int first_row_of_warp = warp_row;
    asm volatile("" : "+r"(first_row_of_warp));  // or its bounds would wait in registers
    const bool seen = !masked || sees_keys<spec.masking, kRowsPerWarp>(
                                     bounds, first_row_of_warp, step * spec.tile_n, spec.tile_n);
    Scores s;
    if (seen) products.multiply_keys(s, key_tile(step));
    if constexpr (spec.stages == 1) {
      copy_async_wait<0>();  // values of this step
      __syncthreads();
      load_keys(step - 1, AllRows{});
    }
    if (seen) weigh(s, step, masked);
  };
  int step = steps.last;
#pragma unroll 1
  for (; step > steps.free_last && step >= steps.first; --step) take_step(step, Constant<true>{});
#pragma unroll 1
  for (; step >= steps.free_first; --step) take_step(step, Constant<false>{});
  if constexpr (spec.masking == Masking::kWindow) {
#pragma unroll 1
    for (; step >= steps.first; --step) take_step(step, Constant<true>{});
  }
  copy_async_wait<0>();
  // Without a step nobody has waited for the others' parts of Q, and outputs take its place.
  if (steps.last < steps.first) __syncthreads();

  // Nothing is kept below 1, which drop_scores() leaves to the scale.
  finish(args, softmax, out, dropout.threshold == 0 ? 0.0f : dropout.scale, q_tile);
}

}  // namespace flash_attn_plus::cuda
