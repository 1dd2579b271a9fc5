// Attention backward: dQ, dK and dV from dO, in five products a pair of blocks.
//
//   S = Q K^T   dP = dO V^T   P = exp(S - lse)   dS = P (dP - D)   D = rowsum(dO O) - dlse
//   dV^T += dO^T P            dK^T += Q^T dS                       dQ += dS K
//
// A task (backward_plan.h) has one block of up to block_n keys of one key head. It packs K and V
// once, as panels that S and dP read, and K again for dQ, keeps dK^T and dV^T as float
// accumulators, and walks through the query heads of the group and their blocks of block_m queries.
// For each it packs Q and dO, makes the scores tile by tile (kTileM x kTileN, in the first-level
// cache; backward_scores.h) where the mask leaves any, then adds to dV^T and dK^T, and last to dQ,
// whose accumulator may be another task's turn. All of a task's operands, some 1 MB, stay in the
// second-level cache; the head of a query block's rows comes from memory once for each block of
// keys, so that the products are the bound: 10 * block_n operations for every element of Q, dO and
// dQ that passes.
//
// Where numbers are multiplied in several bf16 parts, infinity and NaN would not come through: such
// a call runs on floats.
#pragma once

#include "attention/dropout.h"
#include "attention/params.h"
#include "attention/sequence.h"
#include "cpu/backward_operands.h"
#include "cpu/backward_plan.h"
#include "cpu/backward_scores.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Hands out pieces of one allocation; with no memory it only adds up.
struct ScratchMemory {
  char* data = nullptr;
  size_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(data + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// First element of a row of one head.
template <typename T>
FAP_INLINE T* row_of(const Operand& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + row * x.row_stride +
         head * x.head_stride;
}

// Sizes of blocks, a function of the head dimension alone.
template <int kNumParts>
struct BackwardBlocks {
  using Operands = BackwardOperands<kNumParts>;
  static constexpr int64_t kStrips = 4;  // tiles in a block of queries, one above the other
  static constexpr int64_t kBlockM = kStrips * Operands::kTileM;
  static constexpr int64_t kMaxBlockN = 256;
  static constexpr int64_t kMaxTiles = kMaxBlockN / Operands::kTileN;

  static int64_t block_n(int64_t head_dim) {
    return head_dim * std::max(kNumParts, 1) <= 128 ? 256 : 128;
  }
};

// What a worker has in its scratch memory.
template <int kNumParts>
struct BackwardBuffers {
  using Operands = BackwardOperands<kNumParts>;
  using Matrix = typename Operands::Matrix;
  using Blocks = BackwardBlocks<kNumParts>;

  Matrix k_scores, v_scores;  // panels, depth x keys
  Matrix k_rows;              // wide, keys x head dimension
  float *dk, *dv;             // head dimension x keys, dkv_stride apart
  int64_t dkv_stride;
  Matrix q, q_columns;  // block_m rows
  Matrix dout, dout_columns;
  Matrix p, ds_panels;                   // panels, queries x keys
  Matrix ds;                             // rows, queries x keys
  float* dq;                             // block_m rows of width(d)
  float *lse, *softmax_d;                // block_m
  float *scores, *dp, *derivative;       // one tile
  float* ones;                           // kTileN
  DropoutFactors dropout;                // one strip
  int32_t *visible_begin, *visible_end;  // rows of a tile

  BackwardBuffers(ScratchMemory& memory, int64_t head_dim) {
    constexpr int64_t tile = Operands::kTileM * Operands::kTileN;
    const int64_t m = Blocks::kBlockM, n = Blocks::block_n(head_dim);
    const int64_t depth = Operands::depth(head_dim), width = Operands::width(head_dim);
    scores = memory.take<float>(tile);
    dp = memory.take<float>(tile);
    derivative = memory.take<float>(tile);
    ones = memory.take<float>(Operands::kTileN);
    visible_begin = memory.take<int32_t>(Operands::kTileM);
    visible_end = memory.take<int32_t>(Operands::kTileM);
    lse = memory.take<float>(m);
    softmax_d = memory.take<float>(m);
    q = Operands::make_rows(memory, m, width);
    dout = Operands::make_rows(memory, m, width);
    q_columns = Operands::make_columns(memory, q, m, width);
    dout_columns = Operands::make_columns(memory, dout, m, width);
    k_scores = Operands::make_panels(memory, depth, n);
    v_scores = Operands::make_panels(memory, depth, n);
    k_rows = Operands::make_wide(memory, n, width);
    p = Operands::make_panels(memory, m, n);
    ds_panels = Operands::make_panels(memory, m, n);
    ds = Operands::make_rows(memory, m, n);
    dkv_stride = odd_stride(n);
    dk = memory.take<float>(width * dkv_stride);
    dv = memory.take<float>(width * dkv_stride);
    dq = memory.take<float>(m * width);
    dropout.stride = n + DropoutFactors::kKeyAlignment;
    dropout.data =
        memory.take<float>((Operands::kTileM + 2 * DropoutFactors::kRowAlignment) * dropout.stride);
  }
};

template <typename T, int kNumParts>
class BackwardTask {
 public:
  using Operands = BackwardOperands<kNumParts>;
  using Blocks = BackwardBlocks<kNumParts>;
  static constexpr int64_t kTileM = Operands::kTileM, kTileN = Operands::kTileN;

  BackwardTask(const BackwardParams& params, const BackwardPlan& plan, const Dropout& dropout,
               const BackwardBuffers<kNumParts>& buffers, int64_t number, int64_t head_k)
      : params_(params),
        plan_(plan),
        dropout_(dropout),
        buffers_(buffers),
        keys_(plan.key_block(number)),
        head_k_(head_k),
        mask_(sequence_at(params, keys_.batch).mask(params)),
        d_(params.head_dim),
        num_keys_(round_up(keys_.rows.size(), kTileN)) {
    for (int i = 0; i < kTileN; ++i) buffers_.ones[i] = 1.0f;
  }

  void run() {
    pack_keys();
    const int64_t accumulators = Operands::width(d_) * buffers_.dkv_stride;
    std::memset(buffers_.dk, 0, accumulators * sizeof(float));
    std::memset(buffers_.dv, 0, accumulators * sizeof(float));
    const Range blocks = plan_.query_blocks(keys_);
    const int64_t group = params_.group_size();
    for (int64_t head = head_k_ * group; head < (head_k_ + 1) * group; ++head) {
      const ScoreRule rule = make_score_rule(params_, keys_.batch, head);
      for (int64_t index = blocks.begin; index < blocks.end; ++index) {
        const BackwardBlock queries = plan_.query_block(keys_, index);
        pack_queries(queries, head);
        make_scores(queries, head, rule);
        add_to_dk_dv();
        if (!add_to_dq(queries, head)) return;
      }
    }
    write_keys(params_.dk, buffers_.dk);
    write_keys(params_.dv, buffers_.dv);
  }

 private:
  // Pointers to rows, those from `count` on null.
  template <typename U>
  void point_to_rows(const Operand& x, int64_t head, int64_t begin, int64_t count, int64_t num_rows,
                     U** rows) const {
    for (int64_t i = 0; i < num_rows; ++i) {
      rows[i] = i < count ? row_of<U>(x, keys_.batch, head, begin + i) : nullptr;
    }
  }

  void pack_keys() {
    const T* rows[Blocks::kMaxBlockN];
    point_to_rows(params_.k, head_k_, keys_.begin, keys_.rows.size(), num_keys_, rows);
    Operands::pack_transposed(rows, num_keys_, d_, buffers_.k_scores);
    Operands::pack_wide(rows, num_keys_, d_, buffers_.k_rows);
    point_to_rows(params_.v, head_k_, keys_.begin, keys_.rows.size(), num_keys_, rows);
    Operands::pack_transposed(rows, num_keys_, d_, buffers_.v_scores);
  }

  // Rows beyond the last get lse = inf, which makes their probabilities 0.
  void pack_queries(const BackwardBlock& queries, int64_t head) {
    num_strips_ = (queries.rows.size() + kTileM - 1) / kTileM;
    const int64_t num_rows = num_strips_ * kTileM;
    const T* rows[Blocks::kBlockM];
    point_to_rows(params_.q, head, queries.begin, queries.rows.size(), num_rows, rows);
    Operands::pack_rows_and_columns(rows, num_rows, d_, buffers_.q, buffers_.q_columns);
    point_to_rows(params_.dout, head, queries.begin, queries.rows.size(), num_rows, rows);
    Operands::pack_rows_and_columns(rows, num_rows, d_, buffers_.dout, buffers_.dout_columns);

    const float* lse = row_vector(params_.softmax_lse, head, queries.begin);
    const float* softmax_d = row_vector(params_.softmax_d, head, queries.begin);
    for (int64_t i = 0; i < num_rows; ++i) {
      const bool valid = i < queries.rows.size();
      buffers_.lse[i] = valid ? lse[i * params_.softmax_lse.row_stride] * kLog2E : kInfinity;
      buffers_.softmax_d[i] =
          valid ? softmax_d[i * params_.softmax_d.row_stride] * params_.softmax_scale : 0.0f;
    }
  }

  const float* row_vector(const RowVector& x, int64_t head, int64_t row) const {
    return x.data + keys_.batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
  }

  // P and dS of the tiles that the mask leaves; strip_tiles_ says which they are.
  void make_scores(const BackwardBlock& queries, int64_t head, const ScoreRule& rule) {
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      const int64_t begin = queries.rows.begin + strip * kTileM;
      const Range rows{begin, std::min(begin + kTileM, queries.rows.end)};
      const Range some = mask_.any_visible_keys(rows), all = mask_.all_visible_keys(rows);
      Range& tiles = strip_tiles_[strip];
      tiles.begin = std::max<int64_t>(0, some.begin - keys_.rows.begin) / kTileN;
      tiles.end = (std::min(some.end, keys_.rows.end) - keys_.rows.begin + kTileN - 1) / kTileN;
      if (tiles.empty()) tiles = {0, 0};
      if (dropout_.enabled() && !tiles.empty()) {
        const Range keys{keys_.rows.begin + tiles.begin * kTileN,
                         keys_.rows.begin + tiles.end * kTileN};
        fill_dropout_factors(dropout_, keys_.batch, head, rows, keys, buffers_.dropout);
      }
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const int64_t key = keys_.rows.begin + tile * kTileN;
        const bool masked = key < all.begin || key + kTileN > all.end;
        if (masked) find_visible(rows, key);
        make_tile(strip, tile, rows.begin, key, masked, rule);
      }
    }
  }

  // The keys that each row sees, counted from `key`.
  void find_visible(Range rows, int64_t key) {
    for (int64_t i = 0; i < kTileM; ++i) {
      Range visible;
      if (i < rows.size()) visible = mask_.visible_keys(rows.begin + i);
      const auto relative = [&](int64_t k) {
        return static_cast<int32_t>(std::clamp<int64_t>(k - key, 0, kTileN));
      };
      buffers_.visible_begin[i] = relative(visible.begin);
      buffers_.visible_end[i] = relative(visible.end);
    }
  }

  void make_tile(int64_t strip, int64_t tile, int64_t row, int64_t key, bool masked,
                 const ScoreRule& rule) {
    const int64_t depth = Operands::depth(d_), first = strip * kTileM;
    Operands::multiply_rows(kTileM, kTileN, depth, Operands::rows_from(buffers_.q, first, 0),
                            Operands::panel_from(buffers_.k_scores, depth, 0, tile * kTileN),
                            buffers_.scores, kTileN, false);
    Operands::multiply_rows(kTileM, kTileN, depth, Operands::rows_from(buffers_.dout, first, 0),
                            Operands::panel_from(buffers_.v_scores, depth, 0, tile * kTileN),
                            buffers_.dp, kTileN, false);
    ScoreTile<kNumParts> score_tile{
        .scores = buffers_.scores,
        .dp = buffers_.dp,
        .lse = buffers_.lse + first,
        .softmax_d = buffers_.softmax_d + first,
        .exponent_scale = rule.exponent_scale,
        .softmax_scale = params_.softmax_scale,
        .derivative = buffers_.ones,
        .derivative_stride = 0,
        .dropout = buffers_.ones,
        .dropout_stride = 0,
        .visible_begin = buffers_.visible_begin,
        .visible_end = buffers_.visible_end,
        .p_panel = Operands::panel_from(buffers_.p, Blocks::kBlockM, first, tile * kTileN),
        .ds_panel = Operands::panel_from(buffers_.ds_panels, Blocks::kBlockM, first, tile * kTileN),
        .ds_rows = Operands::rows_from(buffers_.ds, first, tile * kTileN)};
    if (rule.rewrites()) {
      const int64_t diagonal = row + mask_.offset() - key;
      rewrite_scores<kTileM, kTileN>(rule, diagonal, buffers_.scores, buffers_.derivative);
    }
    if (rule.softcap > 0.0f) {
      score_tile.derivative = buffers_.derivative;
      score_tile.derivative_stride = kTileN;
    }
    if (dropout_.enabled()) {
      score_tile.dropout = buffers_.dropout.at(row, key);
      score_tile.dropout_stride = buffers_.dropout.stride;
    }
    finish_tile(score_tile, masked, rule.softcap > 0.0f || dropout_.enabled());
  }

  // dV^T += dO^T P, dK^T += Q^T dS: for every tile of keys over the strips that have scores there,
  // which are successive ones.
  void add_to_dk_dv() {
    const int64_t depth = Operands::depth(d_);
    for (int64_t tile = 0; tile < num_keys_ / kTileN; ++tile) {
      int64_t begin = 0, end = num_strips_;
      const auto has_scores = [&](int64_t strip) {
        return strip_tiles_[strip].begin <= tile && tile < strip_tiles_[strip].end;
      };
      while (begin < end && !has_scores(begin)) ++begin;
      while (begin < end && !has_scores(end - 1)) --end;
      if (begin == end) continue;
      const int64_t row = begin * kTileM, rows = (end - begin) * kTileM, key = tile * kTileN;
      Operands::multiply_columns(depth, kTileN, rows,
                                 Operands::columns_from(buffers_.dout_columns, row),
                                 Operands::panel_from(buffers_.p, Blocks::kBlockM, row, key),
                                 buffers_.dv + key, buffers_.dkv_stride, true);
      Operands::multiply_columns(
          depth, kTileN, rows, Operands::columns_from(buffers_.q_columns, row),
          Operands::panel_from(buffers_.ds_panels, Blocks::kBlockM, row, key), buffers_.dk + key,
          buffers_.dkv_stride, true);
    }
  }

  // dQ (+)= dS K, and out it goes after the last turn. False: the call has failed elsewhere.
  bool add_to_dq(const BackwardBlock& queries, int64_t head) {
    const int64_t width = Operands::width(d_);
    const BackwardPlan::Turn turn = plan_.turn(keys_, queries, head);
    float* dq = turn.accumulator != nullptr ? turn.accumulator : buffers_.dq;
    if (!plan_.wait(turn)) return false;
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      const Range tiles = strip_tiles_[strip];
      const int64_t row = strip * kTileM, key = tiles.begin * kTileN;
      if (!tiles.empty()) {
        Operands::multiply_rows(
            kTileM, width, tiles.size() * kTileN, Operands::rows_from(buffers_.ds, row, key),
            Operands::wide_from(buffers_.k_rows, key), dq + row * width, width, !turn.first);
      } else if (turn.first) {
        std::memset(dq + row * width, 0, kTileM * width * sizeof(float));
      }
    }
    if (turn.last) {
      for (int64_t i = 0; i < queries.rows.size(); ++i) {
        T* out = row_of<T>(params_.dq, keys_.batch, head, queries.begin + i);
        for (int64_t x = 0; x < d_; x += kLanes) {
          const Vec v = load(dq + i * width + x);
          if (x + kLanes <= d_) {
            store_float(out + x, v);
          } else {
            store_float_partial(out + x, v, static_cast<int>(d_ - x));
          }
        }
      }
    }
    plan_.pass(turn);
    return true;
  }

  void write_keys(const Operand& gradient, const float* accumulator) const {
    T* rows[Blocks::kMaxBlockN];
    point_to_rows(gradient, head_k_, keys_.begin, keys_.rows.size(), num_keys_, rows);
    unpack_columns(accumulator, buffers_.dkv_stride, static_cast<int>(num_keys_), d_, rows);
  }

  const BackwardParams& params_;
  const BackwardPlan& plan_;
  const Dropout& dropout_;
  BackwardBuffers<kNumParts> buffers_;
  const BackwardBlock keys_;
  const int64_t head_k_;
  const Mask mask_;
  const int64_t d_;
  const int64_t num_keys_;  // of the block, whole tiles
  int64_t num_strips_ = 0;  // of the block of queries at hand
  Range strip_tiles_[Blocks::kStrips];
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
  const Dropout dropout = make_dropout(params.dropout_p, params.seed, params.offset);
  ScratchMemory size;
  BackwardBuffers<kNumParts>(size, params.head_dim);
  // The key block is the slowest index: see backward_plan.h.
  parallel_for(
      params.num_threads, plan.num_key_blocks() * params.num_heads_k, [&](int64_t index, int) {
        try {
          ScratchMemory memory{static_cast<char*>(thread_scratch(size.used))};
          const BackwardBuffers<kNumParts> buffers(memory, params.head_dim);
          const AmxTiles tiles;
          BackwardTask<T, kNumParts>(params, plan, dropout, buffers, index / params.num_heads_k,
                                     index % params.num_heads_k)
              .run();
        } catch (...) {
          plan.abandon();
          throw;
        }
      });
}

template <typename T, int kNumParts>
inline void backward_of(const BackwardParams& params) {
  const BackwardPlan plan(params, BackwardBlocks<kNumParts>::kBlockM,
                          BackwardBlocks<kNumParts>::block_n(params.head_dim),
                          BackwardOperands<kNumParts>::width(params.head_dim));
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
      return backward_of<float, 0>(params);
    case DType::kFloat16:
      return backward_of<Half, 0>(params);
    case DType::kBFloat16:
      return backward_of<BFloat16, kParts<BFloat16> == 1 ? 1 : 0>(params);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
