// Attention backward with mma.sync, compute capability 8.0 and later: dK, dV, and the parts of dQ.
//
// A block of threads owns tile_n keys of one key head. K and V stay in shared memory, dK and dV in
// registers, summed over all query heads of the group. Its steps go over the blocks of tile_m
// queries that see one of the keys: S = Q K^T and dP = dO V^T, P and dS in registers, and through
// shared memory (rounded to 16 bits) to dV += P^T dO, dK += dS^T Q and dQ = dS K, which is added to
// an accumulator in memory. Q and dO come by cp.async, one step ahead where they have two buffers.
//
// The warps share each product in their own way, in parts of about 32 x 32: with less, reads of
// fragments from shared memory, and not the tensor cores, would set the pace. They are the closer
// limit anyway, so barriers and exponentials must hide: P is computed while dP is multiplied, and
// where the registers allow it several blocks share a multiprocessor.
//
// Deterministic mode: the blocks of keys add to a block of queries in the order of their keys. They
// are numbered in the order in which they start, so whoever is waited for is running.
#pragma once

#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/sm80/backward_block.cuh"
#include "cuda/kernels/sm80/backward_products.cuh"
#include "cuda/kernels/sm80/backward_scores.cuh"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

constexpr int kScoreWarpsN = spec.num_warps / spec.score_warps_m;
constexpr int kKeyWarpsD = spec.num_warps / spec.key_warps_n;
constexpr int kQueryWarpsD = spec.num_warps / spec.query_warps_m;

// What a warp has of each product, in fragments of 16 x 8.
constexpr int kScoreM = spec.tile_m / spec.score_warps_m / 16;
constexpr int kScoreN = spec.tile_n / kScoreWarpsN / 8;
constexpr int kKeyN = spec.tile_n / spec.key_warps_n / 16;
constexpr int kKeyD = spec.head_dim / kKeyWarpsD / 8;
constexpr int kQueryM = spec.tile_m / spec.query_warps_m / 16;
constexpr int kQueryD = spec.head_dim / kQueryWarpsD / 8;
static_assert(kScoreM * 16 * spec.score_warps_m == spec.tile_m);
static_assert(kScoreN * 8 * kScoreWarpsN == spec.tile_n && kScoreN % 2 == 0);
static_assert(kKeyN * 16 * spec.key_warps_n == spec.tile_n);
static_assert(kKeyD * 8 * kKeyWarpsD == spec.head_dim && kKeyD % 2 == 0);
static_assert(kQueryM * 16 * spec.query_warps_m == spec.tile_m);
static_assert(kQueryD * 8 * kQueryWarpsD == spec.head_dim && kQueryD % 2 == 0);
static_assert(spec.do_stages <= spec.q_stages && spec.q_stages <= 2);

extern "C" __global__ void __launch_bounds__(spec.threads(), spec.min_blocks)
    attention_backward(const __grid_constant__ BackwardArgs args) {
  extern __shared__ uint4 shared_memory[];
  const BackwardParams& params = args.params;
  const SharedMemory shared{shared_address(shared_memory)};

  uint32_t number = blockIdx.x;
  if constexpr (spec.deterministic) {
    if (read_thread() == 0) {
      const uint32_t ticket = atomicAdd(args.ticket, 1u);
      store_shared(shared.base, ticket);
    }
    __syncthreads();
    number = load_shared4(shared.base);
    __syncthreads();
  }
  const KeyBlock block{args, params, shared};
  if (!block.find(number)) return;

  Fragments<kKeyN, kKeyD> dk, dv;
  set_zero(dk);
  set_zero(dv);

  Step step = Step::of(0, shared.steps().last_block, 0);
  if (shared.steps().num_heads > 0) {
    float row_values[kRowValues];
    block.load_keys();
    block.load_queries(params.q, shared.q(0), step);
    block.load_queries(params.dout, shared.dout(step.stage()), step);
    block.load_row_values(row_values, step);
    block.store_row_values(row_values);
    copy_async_commit();
  }

#pragma unroll 1
  for (; step.head < shared.steps().num_heads; step = step.next(shared.steps())) {
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (spec.deterministic) {
      if (!step.is_first(shared.steps())) block.pass_turn(step.previous(shared.steps()));
    }

    // What has a second buffer is asked for now. A branch of its own: among the products the
    // addresses would take the last registers.
    const Step next = step.next(shared.steps());
    const bool has_next = next.head < shared.steps().num_heads;
    float row_values[kRowValues];
    if (has_next) {
      if constexpr (spec.q_stages == 2) {
        block.load_queries(params.q, shared.q(next.stage()), next);
      }
      if constexpr (spec.do_stages == 2) {
        block.load_queries(params.dout, shared.dout(next.stage()), next);
      }
      block.load_row_values(row_values, next);
    }
    copy_async_commit();

    const QTile q = shared.q(step.stage()), dout = shared.dout(step.stage());
    Fragments<kScoreM, kScoreN> p, ds;  // first S and dP
    {
      const int lane = read_lane(), warp = read_thread() / 32;
      const int score_row = warp / kScoreWarpsN * (16 * kScoreM);
      const int score_col = warp % kScoreWarpsN * (8 * kScoreN);
      const auto exponentiate = [&] {
        const Place place = shared.place();
        const Keys keys = shared.keys();
        const int head = block.head(place, step);
        const ScoreTransform transform(params, spec.softcap, place.batch, head);
        Dropout dropout;
        if constexpr (spec.dropout) dropout = shared.dropout();
        exponentiate_scores<spec.softcap, spec.alibi, spec.dropout, spec.tile_m>(
            p, ds, shared.rows() + score_row * 4, transform, keys.seqlen_k - keys.seqlen_q, dropout,
            static_cast<uint32_t>(place.batch), static_cast<uint32_t>(head),
            step.block() * spec.tile_m + score_row, keys.first + score_col, lane);
      };
      set_zero(p);
      multiply_add<spec.dtype, spec.head_dim>(p, RowsOfA<QTile>(q, score_row, 0, lane),
                                              RowsOfB<KTile>(shared.k(), score_col, 0, lane));
      if constexpr (!spec.softcap) exponentiate();
      set_zero(ds);
      multiply_add<spec.dtype, spec.head_dim>(ds, RowsOfA<QTile>(dout, score_row, 0, lane),
                                              RowsOfB<KTile>(shared.v(), score_col, 0, lane));
      if constexpr (spec.softcap) exponentiate();
      if constexpr (!spec.softcap) {
        float scale = 1.0f;
        if constexpr (spec.dropout) scale = shared.dropout().scale;
        differentiate_scores<spec.dropout, spec.tile_m>(p, ds, shared.rows() + score_row * 4, scale,
                                                        lane);
      }
      if (block.needs_mask(step)) block.hide(p, ds, step, score_row, score_col, lane);
      if constexpr (spec.dropout) keep_entries(p);
      store_fragments<spec.dtype>(p, shared.p(), score_row, score_col, lane);
      store_fragments<spec.dtype>(ds, shared.ds(), score_row, score_col, lane);
    }
    if constexpr (spec.deterministic) block.wait_for_turn(step);
    __syncthreads();

    if (has_next) block.store_row_values(row_values);  // all have read those of this step

    const int lane = read_lane(), warp = read_thread() / 32;
    const int key_row = warp / kKeyWarpsD * (16 * kKeyN);
    const int key_col = warp % kKeyWarpsD * (8 * kKeyD);
    const auto add_dv = [&] {
      multiply_add<spec.dtype, spec.tile_m>(dv, ColumnsOfA<ScoreTile>(shared.p(), 0, key_row, lane),
                                            ColumnsOfB<QTile>(dout, 0, key_col, lane));
    };
    const auto add_dk = [&] {
      multiply_add<spec.dtype, spec.tile_m>(dk,
                                            ColumnsOfA<ScoreTile>(shared.ds(), 0, key_row, lane),
                                            ColumnsOfB<QTile>(q, 0, key_col, lane));
    };
    const auto add_dq = [&] {
      const int query_row = warp / kQueryWarpsD * (16 * kQueryM);
      const int query_col = warp % kQueryWarpsD * (8 * kQueryD);
      Fragments<kQueryM, kQueryD> dq;
      set_zero(dq);
      multiply_add<spec.dtype, spec.tile_n>(dq, RowsOfA<ScoreTile>(shared.ds(), query_row, 0, lane),
                                            ColumnsOfB<KTile>(shared.k(), 0, query_col, lane));
      add_fragments<spec.vector_add, spec.head_dim>(
          dq,
          args.accumulator + int64_t{block.accumulator_block(step)} * (spec.tile_m * spec.head_dim),
          query_row / 16, query_col / 8, lane);
    };
    // A tile with one buffer is loaded again as soon as nobody reads it any more, under the
    // products that are left.
    const auto load_again = [&](bool with_q) {
      __syncthreads();
      if (has_next) {
        if (with_q) block.load_queries(params.q, q, next);
        block.load_queries(params.dout, dout, next);
      }
      copy_async_commit();
    };
    if constexpr (spec.do_stages == 2) {
      add_dq();
      add_dv();
      add_dk();
    } else if constexpr (spec.q_stages == 2) {
      add_dv();
      load_again(false);
      add_dq();
      add_dk();
    } else {
      add_dv();
      add_dk();
      load_again(true);
      add_dq();
    }
  }

  // dK and dV, by way of the tiles of K and V.
  copy_async_wait<0>();
  __syncthreads();
  if constexpr (spec.deterministic) {
    if (shared.steps().num_heads > 0) block.pass_turn(step.previous(shared.steps()));
  }
  const auto scale = [](Fragments<kKeyN, kKeyD>& x, float factor) {
#pragma unroll
    for (int n = 0; n < kKeyN; ++n) {
#pragma unroll
      for (int d = 0; d < kKeyD; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][d][i] *= factor;
      }
    }
  };
  scale(dk, params.softmax_scale);
  if constexpr (spec.dropout) scale(dv, shared.dropout().scale);
  const int warp = warp_id();
  const int key_row = warp / kKeyWarpsD * (16 * kKeyN);
  const int key_col = warp % kKeyWarpsD * (8 * kKeyD);
  store_fragments<spec.dtype>(dk, shared.k(), key_row, key_col, lane_id());
  store_fragments<spec.dtype>(dv, shared.v(), key_row, key_col, lane_id());
  __syncthreads();
  block.store_keys(params.dk, shared.k());
  block.store_keys(params.dv, shared.v());
}

}  // namespace flash_attn_plus::cuda
