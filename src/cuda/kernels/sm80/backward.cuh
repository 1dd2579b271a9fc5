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
// limit anyway; two resident blocks of 4 warps let one compute while the other waits at a barrier.
//
// Deterministic mode: the blocks of keys add to a block of queries in the order of their keys. They
// are numbered in the order in which they start, so whoever is waited for is running.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/sm80/backward_products.cuh"
#include "cuda/kernels/sm80/backward_scores.cuh"
#include "cuda/kernels/tile.cuh"
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

using QTile = Tile<spec.tile_m, spec.head_dim>;    // Q, dO
using KTile = Tile<spec.tile_n, spec.head_dim>;    // K, V
using ScoreTile = Tile<spec.tile_m, spec.tile_n>;  // P, dS

constexpr int kRowValues = (2 * spec.tile_m + spec.threads() - 1) / spec.threads();

struct SharedMemory {
  uint32_t base;

  FAP_DEVICE KTile k() const { return {base}; }
  FAP_DEVICE KTile v() const { return {base + KTile::kBytes}; }
  FAP_DEVICE QTile q(int step) const {
    return {base + 2 * KTile::kBytes + step % spec.q_stages * QTile::kBytes};
  }
  FAP_DEVICE QTile dout(int step) const {
    return {base + 2 * KTile::kBytes + (spec.q_stages + step % spec.do_stages) * QTile::kBytes};
  }
  static constexpr int kScores =
      2 * KTile::kBytes + (spec.q_stages + spec.do_stages) * QTile::kBytes;
  FAP_DEVICE ScoreTile p() const { return {base + kScores}; }
  FAP_DEVICE ScoreTile ds() const { return {base + kScores + ScoreTile::kBytes}; }
  // tile_m log-sum-exps (in log2), then as many softmax_d.
  FAP_DEVICE uint32_t rows(int step) const {
    return base + kScores + 2 * ScoreTile::kBytes + step % 2 * (2 * spec.tile_m * 4);
  }
};

// A block of threads' steps: the blocks of queries from the last to the first, for one head of the
// group after the other.
struct Step {
  int head;   // within the group
  int block;  // of tile_m queries
  int number;

  FAP_DEVICE Step next(int first_block, int last_block) const {
    return block == first_block ? Step{head + 1, last_block, number + 1}
                                : Step{head, block - 1, number + 1};
  }
};

// The same number in all lanes, and known to be: it stays in uniform registers.
FAP_DEVICE int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
FAP_DEVICE float uniform(float x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

// One block of keys and one key head.
struct KeyBlock {
  const BackwardArgs& args;
  const BackwardParams& params;
  SharedMemory shared;
  int thread;
  int batch;
  int head_k;
  int q_begin, k_begin;  // first row of the sequence, first row of the block
  int first_key;         // of the block, in the sequence
  int seqlen_q, seqlen_k;
  int queries_begin, queries_end;  // queries that see a key of the sequence; no others are read
  int free_begin, free_end;        // queries that see all keys of the block, which is whole

  FAP_DEVICE KeyBlock(const BackwardArgs& args, SharedMemory shared, int batch, int head_k,
                      const Sequence& sequence, int first_key)
      : args(args),
        params(args.params),
        shared(shared),
        thread(static_cast<int>(threadIdx.x)),
        batch(uniform(batch)),
        head_k(uniform(head_k)),
        q_begin(uniform(static_cast<int>(sequence.q_begin))),
        k_begin(uniform(static_cast<int>(sequence.k_begin) + first_key)),
        first_key(uniform(first_key)),
        seqlen_q(uniform(static_cast<int>(sequence.seqlen_q))),
        seqlen_k(uniform(static_cast<int>(sequence.seqlen_k))) {
    const Range all = mask().any_seeing_queries({0, seqlen_k});
    queries_begin = uniform(static_cast<int>(all.begin));
    queries_end = uniform(static_cast<int>(all.end));
    const Range keys{first_key, first_key + spec.tile_n};
    const Range free = keys.end <= seqlen_k ? mask().all_seeing_queries(keys) : Range{0, 0};
    free_begin = uniform(max_of(queries_begin, static_cast<int>(free.begin)));
    free_end = uniform(min_of(queries_end, static_cast<int>(free.end)));
  }

  FAP_DEVICE Mask mask() const {
    return {seqlen_q, seqlen_k, params.window_left, params.window_right};
  }
  FAP_DEVICE int head(Step step) const {
    return head_k * static_cast<int>(args.group_size) + step.head;
  }
  FAP_DEVICE bool sees(int query) const { return queries_begin <= query && query < queries_end; }
  FAP_DEVICE bool needs_mask(Step step) const {
    const int row = step.block * spec.tile_m;
    return row < free_begin || row + spec.tile_m > free_end;
  }

  FAP_DEVICE uint16_t* rows_of(const Operand& x, int head, int row) const {
    return static_cast<uint16_t*>(x.data) + batch * x.batch_stride + row * x.row_stride +
           head * x.head_stride;
  }

  FAP_DEVICE void load_keys() const {
    const auto load = [&](const Operand& x, KTile tile) {
      load_rows<spec.access, spec.threads()>(tile, thread, static_cast<int>(params.head_dim),
                                             rows_of(x, head_k, k_begin), x.row_stride, 0,
                                             seqlen_k - first_key);
    };
    load(params.k, shared.k());
    load(params.v, shared.v());
  }
  FAP_DEVICE void load_queries(const Operand& x, QTile tile, Step step) const {
    const int row = step.block * spec.tile_m;
    load_rows<spec.access, spec.threads()>(tile, thread, static_cast<int>(params.head_dim),
                                           rows_of(x, head(step), q_begin + row), x.row_stride,
                                           queries_begin - row, queries_end - row);
  }

  // Log-sum-exps and softmax_d of a step, by way of the registers: +inf and 0 where nothing is
  // seen.
  FAP_DEVICE void load_row_values(float (&values)[kRowValues], Step step) const {
#pragma unroll
    for (int x = 0; x < kRowValues; ++x) {
      const int i = thread + x * spec.threads();
      const bool second = i >= spec.tile_m;
      const int row = step.block * spec.tile_m + (second ? i - spec.tile_m : i);
      values[x] = second ? 0.0f : kInfinity;
      if (i < 2 * spec.tile_m && sees(row)) {
        const RowVector& vector = second ? params.softmax_d : params.softmax_lse;
        const float value =
            vector.data[batch * vector.batch_stride + head(step) * vector.head_stride +
                        (q_begin + row) * vector.row_stride];
        values[x] = second ? value : value * kLog2E;
      }
    }
  }
  FAP_DEVICE void store_row_values(const float (&values)[kRowValues], int step) const {
#pragma unroll
    for (int x = 0; x < kRowValues; ++x) {
      const int i = thread + x * spec.threads();
      if (i < 2 * spec.tile_m) store_shared(shared.rows(step) + i * 4, __float_as_uint(values[x]));
    }
  }

  FAP_DEVICE int64_t accumulator_block(Step step) const {
    return args.first_accumulator_block(batch, head(step), q_begin) + step.block;
  }

  // How many blocks of keys add to a block of queries before this one.
  FAP_DEVICE uint32_t turn(Step step) const {
    const int row = step.block * spec.tile_m;
    const Range rows{max_of(row, queries_begin), min_of(row + spec.tile_m, queries_end)};
    return static_cast<uint32_t>(first_key / spec.tile_n -
                                 mask().any_visible_keys(rows).begin / spec.tile_n);
  }
  FAP_DEVICE void wait_for_turn(Step step) const {
    if (thread != 0) return;
    const uint32_t* counter = args.counters + accumulator_block(step);
    const uint32_t before = turn(step);
    while (load_acquire(counter) < before) {
    }
  }
  // Call behind a barrier that follows the additions of all threads.
  FAP_DEVICE void pass_turn(Step step) const {
    if (thread == 0) add_release(args.counters + accumulator_block(step), 1);
  }

  FAP_DEVICE void store_keys(const Operand& x, KTile tile, int rows) const {
    store_rows<spec.access, spec.threads()>(tile, thread, static_cast<int>(params.head_dim),
                                            rows_of(x, head_k, k_begin), x.row_stride, rows);
  }
};

// Rows of k that a sequence has, in use or not.
FAP_DEVICE int64_t rows_of_keys(const BackwardParams& params, int64_t batch,
                                const Sequence& sequence) {
  if (params.seqused_k == nullptr) return sequence.seqlen_k;
  if (params.cu_seqlens_k == nullptr) return params.seqlen_k;
  return clamped(params.cu_seqlens_k[batch + 1] - params.cu_seqlens_k[batch],
                 min_of(params.seqlen_k, params.total_k - sequence.k_begin));
}

extern "C" __global__ void __launch_bounds__(spec.threads(), spec.min_blocks)
    attention_backward(const __grid_constant__ BackwardArgs args) {
  extern __shared__ uint4 shared_memory[];
  const BackwardParams& params = args.params;
  const int thread = static_cast<int>(threadIdx.x);
  const SharedMemory shared{shared_address(shared_memory)};

  uint32_t number = blockIdx.x;
  if constexpr (spec.deterministic) {
    if (thread == 0) {
      const uint32_t ticket = atomicAdd(args.ticket, 1u);
      store_shared(shared.base, ticket);
    }
    __syncthreads();
    number = load_shared4(shared.base);
    __syncthreads();
  }
  const uint32_t group_blocks = args.pairs_per_group * args.num_key_blocks;
  const uint32_t first_pair = number / group_blocks * args.pairs_per_group;
  const uint32_t pairs = min(args.pairs_per_group, args.num_pairs - first_pair);
  const uint32_t rest = number % group_blocks;
  const uint32_t pair = first_pair + rest % pairs;
  const int first_key = static_cast<int>(rest / pairs) * spec.tile_n;
  const uint32_t batch = pair / static_cast<uint32_t>(params.num_heads_k);
  const int head_k = static_cast<int>(pair - batch * static_cast<uint32_t>(params.num_heads_k));
  const Sequence sequence = sequence_at(params, batch);
  const int rows_here = static_cast<int>(rows_of_keys(params, batch, sequence)) - first_key;
  if (rows_here <= 0) return;

  const KeyBlock block(args, shared, static_cast<int>(batch), head_k, sequence, first_key);
  const Range queries =
      block.mask().any_seeing_queries({first_key, min_of(first_key + spec.tile_n, block.seqlen_k)});
  const int first_block = uniform(static_cast<int>(queries.begin / spec.tile_m));
  const int last_block =
      uniform(static_cast<int>((queries.end + spec.tile_m - 1) / spec.tile_m) - 1);
  const int num_steps =
      queries.empty() ? 0 : (last_block - first_block + 1) * static_cast<int>(args.group_size);

  const int warp = warp_id();
  const int score_row = warp / kScoreWarpsN * (16 * kScoreM);
  const int score_col = warp % kScoreWarpsN * (8 * kScoreN);
  const int key_row = warp / kKeyWarpsD * (16 * kKeyN);
  const int key_col = warp % kKeyWarpsD * (8 * kKeyD);
  const int query_row = warp / kQueryWarpsD * (16 * kQueryM);
  const int query_col = warp % kQueryWarpsD * (8 * kQueryD);

  Dropout dropout;
  if constexpr (spec.dropout) {
    dropout = make_dropout(params);
    for (uint32_t& word : dropout.key.word) word = uniform(static_cast<int>(word));
    dropout.threshold = uniform(static_cast<int>(dropout.threshold));
    dropout.scale = uniform(dropout.scale);
  }

  Fragments<kKeyN, kKeyD> dk, dv;
  set_zero(dk);
  set_zero(dv);

  Step step{0, last_block, 0};
  if (num_steps > 0) {
    float row_values[kRowValues];
    block.load_keys();
    block.load_queries(params.q, shared.q(0), step);
    block.load_queries(params.dout, shared.dout(0), step);
    block.load_row_values(row_values, step);
    block.store_row_values(row_values, 0);
    copy_async_commit();
  }

#pragma unroll 1
  for (; step.number < num_steps; step = step.next(first_block, last_block)) {
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (spec.deterministic) {
      if (step.number > 0) {
        const bool head_before = step.block == last_block;
        block.pass_turn(head_before ? Step{step.head - 1, first_block, 0}
                                    : Step{step.head, step.block + 1, 0});
      }
    }

    const Step next = step.next(first_block, last_block);
    const bool has_next = next.number < num_steps;
    float row_values[kRowValues];
    if (has_next) {
      if constexpr (spec.q_stages == 2) {
        block.load_queries(params.q, shared.q(next.number), next);
      }
      if constexpr (spec.do_stages == 2) {
        block.load_queries(params.dout, shared.dout(next.number), next);
      }
      block.load_row_values(row_values, next);
    }
    copy_async_commit();

    const QTile q = shared.q(step.number), dout = shared.dout(step.number);
    {
      Fragments<kScoreM, kScoreN> s, dp;
      const int lane = read_lane();
      set_zero(s);
      multiply_add<spec.dtype, spec.head_dim>(s, RowsOfA<QTile>(q, score_row, 0, lane),
                                              RowsOfB<KTile>(shared.k(), score_col, 0, lane));
      set_zero(dp);
      multiply_add<spec.dtype, spec.head_dim>(dp, RowsOfA<QTile>(dout, score_row, 0, lane),
                                              RowsOfB<KTile>(shared.v(), score_col, 0, lane));

      const uint32_t head = static_cast<uint32_t>(block.head(step));
      ScoreTransform transform(params, spec.softcap, batch, head);
      if constexpr (spec.alibi) transform.slope = uniform(transform.slope);
      const int row = step.block * spec.tile_m + score_row, column = first_key + score_col;
      differentiate_scores<spec.softcap, spec.alibi, spec.dropout, spec.tile_m>(
          s, dp, shared.rows(step.number) + score_row * 4, transform,
          block.seqlen_k - block.seqlen_q, dropout, batch, head, row, column, lane);
      if (block.needs_mask(step)) {
        hide_entries(s, dp, block.mask(), {block.queries_begin, block.queries_end}, row, column);
      }
      store_fragments<spec.dtype>(s, shared.p(), score_row, score_col, lane);
      store_fragments<spec.dtype>(dp, shared.ds(), score_row, score_col, lane);
    }
    if (has_next) block.store_row_values(row_values, next.number);
    if constexpr (spec.deterministic) block.wait_for_turn(step);
    __syncthreads();

    const int lane = read_lane();
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
      Fragments<kQueryM, kQueryD> dq;
      set_zero(dq);
      multiply_add<spec.dtype, spec.tile_n>(dq, RowsOfA<ScoreTile>(shared.ds(), query_row, 0, lane),
                                            ColumnsOfB<KTile>(shared.k(), 0, query_col, lane));
      add_fragments<spec.vector_add, spec.head_dim>(
          dq, args.accumulator + block.accumulator_block(step) * (spec.tile_m * spec.head_dim),
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
    if (num_steps > 0) {
      block.pass_turn({static_cast<int>(args.group_size) - 1, first_block, 0});
    }
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
  if constexpr (spec.dropout) scale(dv, dropout.scale);
  store_fragments<spec.dtype>(dk, shared.k(), key_row, key_col, lane_id());
  store_fragments<spec.dtype>(dv, shared.v(), key_row, key_col, lane_id());
  __syncthreads();
  block.store_keys(params.dk, shared.k(), rows_here);
  block.store_keys(params.dv, shared.v(), rows_here);
}

}  // namespace flash_attn_plus::cuda
