// Attention backward: dQ, dK and dV from dO, in five products a pair of blocks.
//
//   S = Q K^T    dP = dO V^T    P = exp(S - lse)    dS = P (dP - D)    D = rowsum(dO O) - dlse
//   dV^T += dO^T P              dK^T += Q^T dS                         dQ += dS K
//
// A task (backward_plan.h) has one block of keys of one key head. It packs K and V once, keeps dK^T
// and dV^T as float accumulators, and walks through the query heads of the group and their blocks
// of queries: packs Q and dO, makes P and dS tile by tile where the mask leaves any, adds to dV^T
// and dK^T, and last to dQ, whose accumulator it shares with the tasks of the other key blocks
// (backward_pairs.h). So dK and dV are summed over the group before they are rounded, and every
// score is computed once.
//
// All that a task touches, 0.5 to 1.5 MB, stays in the second-level cache. Of the memory beyond,
// each pair of blocks reads Q and dO and reads and writes dQ, for 10 * block_n operations an
// element of one of them, so that the products are the bound. A tile's scores stay in the
// first-level cache.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "attention/dropout.h"
#include "attention/params.h"
#include "attention/sequence.h"
#include "cpu/backward_pairs.h"
#include "cpu/backward_plan.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Queries of a block: a multiple of the height of all tiles. Keys of a block: many, as Q and dO are
// packed for each anew, but no more than the second-level cache allows.
inline constexpr int64_t kBackwardBlockM = 96;
inline constexpr int64_t kBackwardMaxBlockN = 256;
FAP_INLINE int64_t backward_block_n(int64_t head_dim) {
  return head_dim <= 128 ? kBackwardMaxBlockN : kBackwardMaxBlockN / 2;
}

// First element of a row of one head.
template <typename T>
FAP_INLINE T* row_of(const Operand& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + row * x.row_stride +
         head * x.head_stride;
}

template <typename T, int kNumParts>
class BackwardTask {
 public:
  BackwardTask(ScratchMemory& memory, const BackwardParams& params, const BackwardPlan& plan,
               const Dropout& dropout)
      : params_(params),
        plan_(plan),
        dropout_(dropout),
        d_(params.head_dim),
        width_(accumulator_dim(d_)),
        pairs_(memory, kBackwardBlockM, backward_block_n(d_), d_),
        float_pairs_(memory, kFallsBack ? kBackwardBlockM : 0,
                     kFallsBack ? backward_block_n(d_) : 0, d_),
        dkv_stride_(odd_stride(backward_block_n(d_))) {
    dk_ = memory.take<float>(width_ * dkv_stride_);
    dv_ = memory.take<float>(width_ * dkv_stride_);
    dq_ = memory.take<float>(kBackwardBlockM * width_);
    lse_ = memory.take<float>(kBackwardBlockM);
    softmax_d_ = memory.take<float>(kBackwardBlockM);
  }

  static FAP_INLINE int64_t accumulator_dim(int64_t head_dim) { return round_up(head_dim, 32); }

  void run(int64_t key_block, int64_t head_k) {
    const BackwardBlock keys = plan_.key_block(key_block);
    const Mask mask = sequence_at(params_, keys.batch).mask(params_);
    point_to_rows(params_.k, keys, head_k, k_, kBackwardMaxBlockN);
    point_to_rows(params_.v, keys, head_k, v_, kBackwardMaxBlockN);
    keys_finite_ = pairs_.pack_keys(k_, v_, keys.rows);
    float_keys_packed_ = false;
    // Of the columns only those that products reach: a short sequence has few.
    const int64_t num_columns = round_up(keys.rows.size(), kColumnsOfTiles);
    for (int64_t x = 0; x < width_; ++x) {
      std::memset(dk_ + x * dkv_stride_, 0, num_columns * sizeof(float));
      std::memset(dv_ + x * dkv_stride_, 0, num_columns * sizeof(float));
    }

    const Range blocks = plan_.query_blocks(keys);
    const int64_t group = params_.group_size();
    for (int64_t head = head_k * group; head < (head_k + 1) * group; ++head) {
      const ScoreRule rule = make_score_rule(params_, keys.batch, head);
      for (int64_t index = blocks.begin; index < blocks.end; ++index) {
        const BackwardBlock queries = plan_.query_block(keys, index);
        load_row_vectors(queries, head);
        if (!add_block(keys, queries,
                       {.batch = keys.batch,
                        .head = head,
                        .rows = queries.rows,
                        .lse = lse_,
                        .softmax_d = softmax_d_,
                        .softmax_scale = params_.softmax_scale,
                        .rule = rule},
                       mask)) {
          return;
        }
      }
    }
    write_keys(params_.dk, keys, head_k, dk_);
    write_keys(params_.dv, keys, head_k, dv_);
  }

 private:
  // Infinity and NaN have no bf16 parts, and must stay away from what the mask hides: a pair of
  // blocks that holds one is multiplied as float. The accumulators are the same.
  static constexpr bool kFallsBack = kNumParts > 0;

  // Keys of a block are multiplied in multiples of this, whichever pairs do it.
  static constexpr int64_t kColumnsOfTiles =
      std::lcm(BlockPairs<kNumParts>::kTileN, BlockPairs<0>::kTileN);
  static_assert(kBackwardMaxBlockN / 2 % kColumnsOfTiles == 0);

  // One pair of blocks. False: the call has failed elsewhere.
  bool add_block(const BackwardBlock& keys, const BackwardBlock& queries, const QueryBlock& block,
                 const Mask& mask) {
    const T *q[kBackwardBlockM], *dout[kBackwardBlockM];
    point_to_rows(params_.q, queries, block.head, q, kBackwardBlockM);
    point_to_rows(params_.dout, queries, block.head, dout, kBackwardBlockM);
    const bool finite = pairs_.pack_queries(q, dout, queries.rows.size()) && keys_finite_;
    if constexpr (kFallsBack) {
      if (!finite) {
        if (!float_keys_packed_) float_pairs_.pack_keys(k_, v_, keys.rows);
        float_keys_packed_ = true;
        float_pairs_.pack_queries(q, dout, queries.rows.size());
        return multiply(float_pairs_, keys, queries, block, mask, false);
      }
    }
    return multiply(pairs_, keys, queries, block, mask, finite);
  }

  // Pointers to the rows of a block, the rest null.
  template <typename U>
  void point_to_rows(const Operand& x, const BackwardBlock& block, int64_t head, U** rows,
                     int64_t num_rows) const {
    U* row = row_of<U>(x, block.batch, head, block.begin);
    const int64_t count = block.rows.size();
    for (int64_t i = 0; i < count; ++i) rows[i] = row + i * x.row_stride;
    for (int64_t i = count; i < num_rows; ++i) rows[i] = nullptr;
  }

  // Rows beyond the last get lse = inf, which makes their probabilities 0.
  void load_row_vectors(const BackwardBlock& queries, int64_t head) {
    const auto row_at = [&](const RowVector& x, int64_t i) {
      return x.data[queries.batch * x.batch_stride + head * x.head_stride +
                    (queries.begin + i) * x.row_stride];
    };
    const int64_t count = queries.rows.size();
    for (int64_t i = 0; i < count; ++i) {
      lse_[i] = row_at(params_.softmax_lse, i) * kLog2E;
      softmax_d_[i] = row_at(params_.softmax_d, i) * params_.softmax_scale;
    }
    for (int64_t i = count; i < kBackwardBlockM; ++i) {
      lse_[i] = kInfinity;
      softmax_d_[i] = 0.0f;
    }
  }

  // dQ waits for its turn and goes out after the last one.
  template <typename Pairs>
  bool multiply(Pairs& pairs, const BackwardBlock& keys, const BackwardBlock& queries,
                const QueryBlock& block, const Mask& mask, bool finite) {
    pairs.make_scores(block, mask, dropout_);
    pairs.add_to_dk_dv(block, mask, finite, dk_, dv_, dkv_stride_);
    const BackwardPlan::Turn turn = plan_.turn(keys, queries, block.head);
    float* dq = turn.accumulator != nullptr ? turn.accumulator : dq_;
    if (!plan_.wait(turn)) return false;
    pairs.add_to_dq(block, mask, finite, dq, width_, !turn.first);
    if (turn.last) {
      for (int64_t i = 0; i < queries.rows.size(); ++i) {
        T* out = row_of<T>(params_.dq, queries.batch, block.head, queries.begin + i);
        for (int64_t x = 0; x < d_; x += kLanes) {
          const Vec value = load(dq + i * width_ + x);
          if (x + kLanes <= d_) {
            store_float(out + x, value);
          } else {
            store_float_partial(out + x, value, static_cast<int>(d_ - x));
          }
        }
      }
    }
    plan_.pass(turn);
    return true;
  }

  void write_keys(const Operand& gradient, const BackwardBlock& keys, int64_t head_k,
                  const float* accumulator) const {
    T* rows[kBackwardMaxBlockN];
    point_to_rows(gradient, keys, head_k, rows, kBackwardMaxBlockN);
    unpack_columns(accumulator, dkv_stride_, static_cast<int>(keys.rows.size()), d_, rows);
  }

  const BackwardParams& params_;
  const BackwardPlan& plan_;
  const Dropout& dropout_;
  const int64_t d_;
  const int64_t width_;  // floats of a row of dQ, rows of dK^T and dV^T

  const T *k_[kBackwardMaxBlockN], *v_[kBackwardMaxBlockN];  // rows of the block of keys
  BlockPairs<kNumParts> pairs_;
  BlockPairs<0> float_pairs_;
  bool keys_finite_ = true;
  bool float_keys_packed_ = false;

  const int64_t dkv_stride_;
  float *dk_, *dv_;          // (head dimension, keys), dkv_stride_ apart
  float* dq_;                // of a block of queries that only one block of keys serves
  float *lse_, *softmax_d_;  // of a block of queries
};

template <typename T>
inline void zero_rows(const Operand& x, int64_t num_heads, int64_t head_dim,
                      const BackwardBlock& rows) {
  for (int64_t i = 0; i < rows.rows.size(); ++i) {
    for (int64_t head = 0; head < num_heads; ++head) {
      std::memset(row_of<T>(x, rows.batch, head, rows.begin + i), 0, head_dim * sizeof(T));
    }
  }
}

// What is done once for each row of the queries: D = rowsum(dO O) - dlse, and dq = 0 where no key
// is seen (there O = 0, whatever dO is).
template <typename T>
inline void prepare_queries(const BackwardParams& params, const BackwardBlock& piece,
                            Range seeing) {
  for (int64_t i = 0; i < piece.rows.size(); ++i) {
    const bool sees = seeing.begin <= piece.rows.begin + i && piece.rows.begin + i < seeing.end;
    const int64_t row = piece.begin + i;
    const auto at = [&](const RowVector& x, int64_t head) -> float& {
      return x.data[piece.batch * x.batch_stride + head * x.head_stride + row * x.row_stride];
    };
    for (int64_t head = 0; head < params.num_heads; ++head) {
      float sum = 0.0f;
      if (sees) {
        const T* dout = row_of<const T>(params.dout, piece.batch, head, row);
        const T* out = row_of<const T>(params.out, piece.batch, head, row);
        Vec partial{};
        for (int64_t x = 0; x < params.head_dim; x += kLanes) {
          partial =
              fma(load_row(dout, x, params.head_dim), load_row(out, x, params.head_dim), partial);
        }
        sum = reduce_add(partial);
      } else {
        std::memset(row_of<T>(params.dq, piece.batch, head, row), 0, params.head_dim * sizeof(T));
      }
      if (params.dsoftmax_lse.data != nullptr) sum -= at(params.dsoftmax_lse, head);
      at(params.softmax_d, head) = sum;
    }
  }
}

// The gradient of one head's sink: minus the sum over all rows of exp(sink - lse) D, in the order
// of the rows.
inline void sink_gradient(const BackwardParams& params, const BackwardPlan& plan, int64_t head) {
  const float sink = params.s_aux[head * params.s_aux_stride];
  double sum = 0.0;
  if (sink != -kInfinity) {
    for (int64_t number = 0; number < plan.num_query_pieces(); ++number) {
      const BackwardBlock piece = plan.query_piece(number);
      const auto vector = [&](const RowVector& x, int64_t i) {
        return x.data[piece.batch * x.batch_stride + head * x.head_stride +
                      (piece.begin + i) * x.row_stride];
      };
      Vec partial{};
      for (int64_t i = 0; i < piece.rows.size(); i += kLanes) {
        float lse[kLanes], softmax_d[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const bool valid = i + lane < piece.rows.size();
          lse[lane] = valid ? vector(params.softmax_lse, i + lane) : kInfinity;
          softmax_d[lane] = valid ? vector(params.softmax_d, i + lane) : 0.0f;
        }
        partial = fma(exp(sink - load(lse)), load(softmax_d), partial);
      }
      sum += reduce_add(partial);
    }
  }
  params.ds_aux[head * params.ds_aux_stride] = static_cast<float>(-sum);
}

template <typename T, int kNumParts>
inline void run_backward_tasks(const BackwardParams& params, const BackwardPlan& plan) {
  const Dropout dropout = make_dropout(params);
  using Task = BackwardTask<T, kNumParts>;
  ScratchMemory size;
  Task(size, params, plan, dropout);
  // The key block is the slowest index: see backward_plan.h.
  parallel_for(params.num_threads, plan.num_key_blocks() * params.num_heads_k,
               [&](int64_t index, int) {
                 try {
                   ScratchMemory memory{static_cast<char*>(thread_scratch(size.used))};
                   Task task(memory, params, plan, dropout);
                   const AmxTiles tiles;
                   task.run(index / params.num_heads_k, index % params.num_heads_k);
                 } catch (...) {
                   plan.abandon();
                   throw;
                 }
               });
}

template <typename T, int kNumParts>
inline void backward_of(const BackwardParams& params) {
  const BackwardPlan plan(params, kBackwardBlockM, backward_block_n(params.head_dim),
                          BackwardTask<T, kNumParts>::accumulator_dim(params.head_dim));
  const int64_t d = params.head_dim;
  const int64_t num_pieces = plan.num_query_pieces();
  const int64_t num_unused_q = plan.num_unused_q(), num_unused_k = plan.num_unused_k();
  parallel_for(params.num_threads, num_pieces + num_unused_q + num_unused_k,
               [&](int64_t index, int) {
                 if (index < num_pieces) {
                   const BackwardBlock piece = plan.query_piece(index);
                   prepare_queries<T>(params, piece, plan.seeing_queries(piece.batch));
                 } else if (index < num_pieces + num_unused_q) {
                   zero_rows<T>(params.dq, params.num_heads, d, plan.unused_q(index - num_pieces));
                 } else {
                   const BackwardBlock rows = plan.unused_k(index - num_pieces - num_unused_q);
                   zero_rows<T>(params.dk, params.num_heads_k, d, rows);
                   zero_rows<T>(params.dv, params.num_heads_k, d, rows);
                 }
               });
  run_backward_tasks<T, kNumParts>(params, plan);
  if (params.ds_aux != nullptr) {
    parallel_for(params.num_threads, params.num_heads,
                 [&](int64_t head, int) { sink_gradient(params, plan, head); });
  }
}

void backward(const BackwardParams& params);
void backward(const BackwardParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return backward_of<float, kParts<float>>(params);
    case DType::kFloat16:
      return backward_of<Half, kParts<Half>>(params);
    case DType::kBFloat16:
      return backward_of<BFloat16, kParts<BFloat16>>(params);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
