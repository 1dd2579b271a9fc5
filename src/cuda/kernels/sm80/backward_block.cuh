// What a block of threads of the backward kernel works on: one block of keys of one key head, and
// the steps over the queries that see them; where all of it lies, and how it comes and goes.
#pragma once

#include "attention/dropout.h"
#include "attention/sequence.h"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/sm80/backward_products.cuh"
#include "cuda/kernels/sm80/backward_scores.cuh"
#include "cuda/kernels/tile.cuh"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

using QTile = Tile<spec.tile_m, spec.head_dim>;    // Q, dO
using KTile = Tile<spec.tile_n, spec.head_dim>;    // K, V
using ScoreTile = Tile<spec.tile_m, spec.tile_n>;  // P, dS

// What every step needs to know. The accumulators leave no registers for it: it lies in shared
// memory, and is read again where it is needed, 16 bytes at a time.
struct Place {
  int batch;
  int head_k;
  int q_begin;            // first row of the sequence
  int accumulator_block;  // its first, of head 0
};
struct Queries {
  int begin, end;            // those that see a key of the sequence; no others are read
  int free_begin, free_end;  // those that see all keys of the block, which is whole
};
struct Keys {
  int first;  // of the block
  int seqlen_q, seqlen_k;
  int rows;  // of k from the first on, those that are not in use too
};
struct Steps {
  int first_block, last_block;  // of tile_m queries
  int num_heads;                // 0: no query sees the keys
  int k_begin;                  // row of the first key
};

// A step: the blocks of queries from the last to the first, for one head of the group after the
// other. Two numbers, because three would not fit the registers.
struct Step {
  int head;             // within the group
  int block_and_stage;  // of tile_m queries, times 2; plus the buffer of its Q

  FAP_DEVICE int block() const { return block_and_stage >> 1; }
  FAP_DEVICE int stage() const { return block_and_stage & 1; }
  FAP_DEVICE static Step of(int head, int block, int stage) { return {head, 2 * block + stage}; }

  FAP_DEVICE Step next(const Steps& steps) const {
    return block() == steps.first_block ? of(head + 1, steps.last_block, stage() ^ 1)
                                        : of(head, block() - 1, stage() ^ 1);
  }
  FAP_DEVICE Step previous(const Steps& steps) const {
    return block() == steps.last_block ? of(head - 1, steps.first_block, stage() ^ 1)
                                       : of(head, block() + 1, stage() ^ 1);
  }
  FAP_DEVICE bool is_first(const Steps& steps) const {
    return head == 0 && block() == steps.last_block;
  }
};

constexpr int kRowValues = (2 * spec.tile_m + spec.threads() - 1) / spec.threads();

struct SharedMemory {
  static constexpr int kQ = 2 * KTile::kBytes;
  static constexpr int kScores = kQ + (spec.q_stages + spec.do_stages) * QTile::kBytes;
  static constexpr int kRows = kScores + 2 * ScoreTile::kBytes;
  static constexpr int kPlaces = kRows + spec.row_buffer_bytes();
  static_assert(kPlaces + spec.place_bytes() == spec.shared_bytes());

  uint32_t base;

  FAP_DEVICE KTile k() const { return {base}; }
  FAP_DEVICE KTile v() const { return {base + KTile::kBytes}; }
  FAP_DEVICE QTile q(int stage) const {
    return {base + kQ + stage % spec.q_stages * QTile::kBytes};
  }
  FAP_DEVICE QTile dout(int stage) const {
    return {base + kQ + (spec.q_stages + stage % spec.do_stages) * QTile::kBytes};
  }
  FAP_DEVICE ScoreTile p() const { return {base + kScores}; }
  FAP_DEVICE ScoreTile ds() const { return {base + kScores + ScoreTile::kBytes}; }
  // tile_m log-sum-exps (in log2), then as many softmax_d.
  FAP_DEVICE uint32_t rows() const { return base + kRows; }

  template <int kIndex, typename T>
  FAP_DEVICE void set(const T& x) const {
    static_assert(sizeof(T) == 16 && 16 * kIndex < spec.place_bytes());
    store_shared16(base + kPlaces + 16 * kIndex, __builtin_bit_cast(uint4, x));
  }
  template <int kIndex, typename T>
  FAP_DEVICE T get() const {
    return __builtin_bit_cast(T, load_shared16(base + kPlaces + 16 * kIndex));
  }
  FAP_DEVICE Place place() const { return get<0, Place>(); }
  FAP_DEVICE Queries queries() const { return get<1, Queries>(); }
  FAP_DEVICE Keys keys() const { return get<2, Keys>(); }
  FAP_DEVICE Steps steps() const { return get<3, Steps>(); }
  FAP_DEVICE Dropout dropout() const { return get<4, Dropout>(); }
};

// Rows of k that a sequence has, in use or not.
FAP_DEVICE int64_t rows_of_keys(const BackwardParams& params, int64_t batch,
                                const Sequence& sequence) {
  if (params.seqused_k == nullptr) return sequence.seqlen_k;
  if (params.cu_seqlens_k == nullptr) return params.seqlen_k;
  return clamped(params.cu_seqlens_k[batch + 1] - params.cu_seqlens_k[batch],
                 min_of(params.seqlen_k, params.total_k - sequence.k_begin));
}

struct KeyBlock {
  const BackwardArgs& args;
  const BackwardParams& params;
  SharedMemory shared;

  // Finds out what the block with this number works on; false when there is nothing.
  FAP_DEVICE bool find(uint32_t number) const {
    const uint32_t group_blocks = args.pairs_per_group * args.num_key_blocks;
    const uint32_t first_pair = number / group_blocks * args.pairs_per_group;
    const uint32_t pairs = min(args.pairs_per_group, args.num_pairs - first_pair);
    const uint32_t rest = number % group_blocks;
    const uint32_t pair = first_pair + rest % pairs;
    const int first_key = static_cast<int>(rest / pairs) * spec.tile_n;
    const int batch = static_cast<int>(pair / static_cast<uint32_t>(params.num_heads_k));
    const int head_k = static_cast<int>(pair) - batch * static_cast<int>(params.num_heads_k);
    const Sequence sequence = sequence_at(params, batch);
    const int rows = static_cast<int>(rows_of_keys(params, batch, sequence)) - first_key;
    if (rows <= 0) return false;

    const Mask mask = sequence.mask(params);
    const Range all = mask.any_seeing_queries({0, sequence.seqlen_k});
    const Range seeing = mask.any_seeing_queries(
        {first_key, min_of<int64_t>(first_key + spec.tile_n, sequence.seqlen_k)});
    const Range free = first_key + spec.tile_n <= sequence.seqlen_k
                           ? mask.all_seeing_queries({first_key, first_key + spec.tile_n})
                           : Range{0, 0};
    if (threadIdx.x == 0) {
      shared.set<0>(Place{batch, head_k, static_cast<int>(sequence.q_begin),
                          static_cast<int>(args.first_accumulator_block(batch, sequence.q_begin))});
      shared.set<1>(Queries{static_cast<int>(all.begin), static_cast<int>(all.end),
                            static_cast<int>(max_of(all.begin, free.begin)),
                            static_cast<int>(min_of(all.end, free.end))});
      shared.set<2>(Keys{first_key, static_cast<int>(sequence.seqlen_q),
                         static_cast<int>(sequence.seqlen_k), rows});
      shared.set<3>(Steps{static_cast<int>(seeing.begin) / spec.tile_m,
                          (static_cast<int>(seeing.end) + spec.tile_m - 1) / spec.tile_m - 1,
                          seeing.empty() ? 0 : static_cast<int>(args.group_size),
                          static_cast<int>(sequence.k_begin) + first_key});
      if constexpr (spec.dropout) shared.set<4>(make_dropout(params));
    }
    __syncthreads();
    return true;
  }

  FAP_DEVICE Mask mask(const Keys& keys) const {
    return {keys.seqlen_q, keys.seqlen_k, params.window_left, params.window_right};
  }
  FAP_DEVICE int head(const Place& place, Step step) const {
    return place.head_k * static_cast<int>(args.group_size) + step.head;
  }
  FAP_DEVICE bool needs_mask(Step step) const {
    const Queries queries = shared.queries();
    const int row = step.block() * spec.tile_m;
    return row < queries.free_begin || row + spec.tile_m > queries.free_end;
  }

  // Zeroes what is not seen of a warp's part of P and dS, which begins at (row, column) of the
  // tile.
  template <int kM, int kN>
  FAP_DEVICE void hide(Fragments<kM, kN>& p, Fragments<kM, kN>& ds, Step step, int row, int column,
                       int lane) const {
    const Queries queries = shared.queries();
    const Keys keys = shared.keys();
    hide_entries(p, ds, KeyBounds(mask(keys)), queries.begin, queries.end,
                 step.block() * spec.tile_m + row, keys.first + column, lane);
  }

  FAP_DEVICE uint16_t* rows_of(const Operand& x, int batch, int head, int row) const {
    return static_cast<uint16_t*>(x.data) + batch * x.batch_stride + row * x.row_stride +
           head * x.head_stride;
  }

  FAP_DEVICE void load_keys() const {
    const Place place = shared.place();
    const Keys keys = shared.keys();
    const auto load = [&](const Operand& x, KTile tile) {
      load_rows<spec.access, spec.threads()>(
          tile, read_thread(), static_cast<int>(params.head_dim),
          rows_of(x, place.batch, place.head_k, shared.steps().k_begin), x.row_stride, 0,
          keys.seqlen_k - keys.first);
    };
    load(params.k, shared.k());
    load(params.v, shared.v());
  }
  FAP_DEVICE void store_keys(const Operand& x, KTile tile) const {
    const Place place = shared.place();
    store_rows<spec.access, spec.threads()>(
        tile, read_thread(), static_cast<int>(params.head_dim),
        rows_of(x, place.batch, place.head_k, shared.steps().k_begin), x.row_stride,
        shared.keys().rows);
  }

  FAP_DEVICE void load_queries(const Operand& x, QTile tile, Step step) const {
    const Place place = shared.place();
    const Queries queries = shared.queries();
    const int row = step.block() * spec.tile_m;
    load_rows<spec.access, spec.threads()>(
        tile, read_thread(), static_cast<int>(params.head_dim),
        rows_of(x, place.batch, head(place, step), place.q_begin + row), x.row_stride,
        queries.begin - row, queries.end - row);
  }

  // Log-sum-exps and softmax_d of a step, by way of the registers: +inf and 0 where nothing is
  // seen.
  FAP_DEVICE void load_row_values(float (&values)[kRowValues], Step step) const {
    const Place place = shared.place();
    const Queries queries = shared.queries();
    const int thread = read_thread();
#pragma unroll
    for (int x = 0; x < kRowValues; ++x) {
      const int i = thread + x * spec.threads();
      const bool second = i >= spec.tile_m;
      const int row = step.block() * spec.tile_m + (second ? i - spec.tile_m : i);
      values[x] = second ? 0.0f : kInfinity;
      if (i < 2 * spec.tile_m && queries.begin <= row && row < queries.end) {
        const RowVector& vector = second ? params.softmax_d : params.softmax_lse;
        const float value =
            vector.data[place.batch * vector.batch_stride + head(place, step) * vector.head_stride +
                        (place.q_begin + row) * vector.row_stride];
        values[x] = second ? value : value * kLog2E;
      }
    }
  }
  FAP_DEVICE void store_row_values(const float (&values)[kRowValues]) const {
    const int thread = read_thread();
#pragma unroll
    for (int x = 0; x < kRowValues; ++x) {
      const int i = thread + x * spec.threads();
      if (i < 2 * spec.tile_m) store_shared(shared.rows() + i * 4, __float_as_uint(values[x]));
    }
  }

  FAP_DEVICE int accumulator_block(Step step) const {
    const Place place = shared.place();
    return place.accumulator_block + head(place, step) * static_cast<int>(args.blocks_per_head) +
           step.block();
  }

  // Returns when all blocks of keys before this one have added to a block of queries.
  FAP_DEVICE void wait_for_turn(Step step) const {
    if (read_thread() != 0) return;
    const Queries queries = shared.queries();
    const Keys keys = shared.keys();
    const int row = step.block() * spec.tile_m;
    const Range rows{max_of(row, queries.begin), min_of(row + spec.tile_m, queries.end)};
    const int first_visible = static_cast<int>(mask(keys).any_visible_keys(rows).begin);
    const int before = keys.first / spec.tile_n - first_visible / spec.tile_n;
    const uint32_t* counter = args.counters + accumulator_block(step);
    while (load_acquire(counter) < static_cast<uint32_t>(before)) {
    }
  }
  // Call behind a barrier that follows the additions of all threads.
  FAP_DEVICE void pass_turn(Step step) const {
    if (read_thread() == 0) add_release(args.counters + accumulator_block(step), 1);
  }
};

}  // namespace flash_attn_plus::cuda
