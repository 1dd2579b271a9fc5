// One block of keys with one block of queries: the five products and what lies between them, with
// the operands laid out for one way to multiply (backward_operands.h).
#pragma once

#include <algorithm>

#include "attention/mask.h"
#include "cpu/backward_operands.h"
#include "cpu/backward_scores.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Hands out pieces of one allocation; without memory it only adds up.
struct ScratchMemory {
  char* data = nullptr;
  size_t used = 0;

  template <typename T>
  FAP_INLINE T* take(int64_t count) {
    char* const piece = data + used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
};

// What a task tells of the block of queries at hand.
struct QueryBlock {
  int64_t batch, head;
  Range rows;              // within the sequence
  const float* lse;        // of its rows, times log2(e); infinity for the rows of padding
  const float* softmax_d;  // of its rows, times softmax_scale; 0 for the rows of padding
  float softmax_scale;
  ScoreRule rule;
};

template <int kNumParts>
class BlockPairs {
 public:
  using Operands = BackwardOperands<kNumParts>;
  using Matrix = typename Operands::Matrix;
  static constexpr int64_t kTileM = Operands::kTileM, kTileN = Operands::kTileN;
  static constexpr int64_t kMaxStrips = 4;  // in a block of queries

  // Blocks of up to block_m queries and block_n keys, multiples of all tiles.
  BlockPairs(ScratchMemory& memory, int64_t block_m, int64_t block_n, int64_t head_dim)
      : block_m_(block_m),
        d_(head_dim),
        depth_(Operands::depth(head_dim)),
        width_(Operands::width(head_dim)) {
    for (int i = 0; i < 2; ++i) {
      scores_[i] = memory.take<float>(kTileM * kTileN);
      dp_[i] = memory.take<float>(kTileM * kTileN);
    }
    derivative_ = memory.take<float>(kTileM * kTileN);
    ones_ = memory.take<float>(kTileN);
    visible_begin_ = memory.take<int32_t>(kTileM);
    visible_end_ = memory.take<int32_t>(kTileM);
    q_ = Operands::make_rows(memory, block_m, width_);
    dout_ = Operands::make_rows(memory, block_m, width_);
    q_columns_ = Operands::make_columns(memory, q_, block_m, width_);
    dout_columns_ = Operands::make_columns(memory, dout_, block_m, width_);
    k_scores_ = Operands::make_panels(memory, depth_, block_n);
    v_scores_ = Operands::make_panels(memory, depth_, block_n);
    k_rows_ = Operands::make_wide(memory, block_n, width_);
    p_ = Operands::make_panels(memory, block_m, block_n);
    ds_panels_ = Operands::make_panels(memory, block_m, block_n);
    ds_ = Operands::make_rows(memory, block_m, block_n);
    dropout_.stride = block_n + DropoutFactors::kKeyAlignment;
    dropout_.data =
        memory.take<float>((kTileM + 2 * DropoutFactors::kRowAlignment) * dropout_.stride);
  }

  // Rows of the block of keys, null ones up to a multiple of kTileN. Whether all are finite.
  template <typename T>
  bool pack_keys(const T* const* k, const T* const* v, Range keys) {
    keys_ = keys;
    num_keys_ = round_up(keys.size(), kTileN);
    for (int64_t i = 0; i < kTileN; ++i) ones_[i] = 1.0f;
    const bool k_finite = Operands::pack_transposed(k, num_keys_, d_, k_scores_);
    Operands::pack_wide(k, num_keys_, d_, k_rows_);
    return Operands::pack_transposed(v, num_keys_, d_, v_scores_) && k_finite;
  }

  // The same for a block of queries, null rows up to a multiple of kTileM.
  template <typename T>
  bool pack_queries(const T* const* q, const T* const* dout, int64_t num_queries) {
    num_strips_ = (num_queries + kTileM - 1) / kTileM;
    const bool q_finite =
        Operands::pack_rows_and_columns(q, num_strips_ * kTileM, d_, q_, q_columns_);
    return Operands::pack_rows_and_columns(dout, num_strips_ * kTileM, d_, dout_, dout_columns_) &&
           q_finite;
  }

  // P and dS of the tiles that the mask leaves; strip_tiles_ says which they are. While one is
  // finished, the products of the next are made.
  void make_scores(const QueryBlock& queries, const Mask& mask, const Dropout& dropout) {
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      const Range some = mask.any_visible_keys(strip_rows(queries, strip));
      Range& tiles = strip_tiles_[strip];
      tiles.begin = std::max<int64_t>(0, some.begin - keys_.begin) / kTileN;
      tiles.end = (std::min(some.end, keys_.end) - keys_.begin + kTileN - 1) / kTileN;
      if (tiles.empty()) tiles = {0, 0};
    }
    Tile next = first_tile(0);
    if (next.strip < num_strips_) start_products(next, 0);
    products_.complete();
    for (int current = 0; next.strip < num_strips_; current ^= 1) {
      const Tile tile = next;
      next = tile.index + 1 < strip_tiles_[tile.strip].end ? Tile{tile.strip, tile.index + 1}
                                                           : first_tile(tile.strip + 1);
      if (next.strip < num_strips_) start_products(next, current ^ 1);
      finish(queries, mask, dropout, tile, current);
    }
  }

  // dV^T += dO^T P and dK^T += Q^T dS, (head dimension, keys): for each tile of keys over the
  // strips that have scores there, which are successive ones. Where something is not finite, a pair
  // that the mask hides adds nothing: a product would add 0 times NaN.
  void add_to_dk_dv(const QueryBlock& queries, const Mask& mask, bool finite, float* dk, float* dv,
                    int64_t stride) const {
    if constexpr (kNumParts == 0) {
      if (!finite) return add_visible_to_dk_dv(queries, mask, dk, dv, stride);
    }
    for (int64_t tile = 0; tile < num_keys_ / kTileN; ++tile) {
      int64_t begin = 0, end = num_strips_;
      const auto has_scores = [&](int64_t strip) {
        return strip_tiles_[strip].begin <= tile && tile < strip_tiles_[strip].end;
      };
      while (begin < end && !has_scores(begin)) ++begin;
      while (begin < end && !has_scores(end - 1)) --end;
      if (begin == end) continue;
      const int64_t row = begin * kTileM, num_rows = (end - begin) * kTileM, key = tile * kTileN;
      Operands::multiply_columns(
          depth_, kTileN, num_rows, Operands::columns_from(dout_columns_, row),
          Operands::panel_from(p_, block_m_, row, key), dv + key, stride, true);
      Operands::multiply_columns(depth_, kTileN, num_rows, Operands::columns_from(q_columns_, row),
                                 Operands::panel_from(ds_panels_, block_m_, row, key), dk + key,
                                 stride, true);
    }
  }

  // dQ = or += dS K, (queries, head dimension).
  void add_to_dq(const QueryBlock& queries, const Mask& mask, bool finite, float* dq,
                 int64_t stride, bool accumulate) const {
    if constexpr (kNumParts == 0) {
      if (!finite) return add_visible_to_dq(queries, mask, dq, stride, accumulate);
    }
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      const Range tiles = strip_tiles_[strip];
      const int64_t row = strip * kTileM, key = tiles.begin * kTileN;
      if (!tiles.empty()) {
        Operands::multiply_rows(
            kTileM, width_, tiles.size() * kTileN, Operands::rows_from(ds_, row, key),
            Operands::wide_from(k_rows_, key), dq + row * stride, stride, accumulate);
      } else if (!accumulate) {
        std::memset(dq + row * stride, 0, kTileM * stride * sizeof(float));
      }
    }
  }

 private:
  struct Tile {
    int64_t strip, index;
  };

  // Calls visit(row, first key of a tile, the keys of the tile that the row sees).
  template <typename Visit>
  void for_each_visible(const QueryBlock& queries, const Mask& mask, const Visit& visit) const {
    for (int64_t row = 0; row < queries.rows.size(); ++row) {
      const Range visible = mask.visible_keys(queries.rows.begin + row);
      const int64_t end = std::min(visible.end, keys_.end) - keys_.begin;
      int64_t begin = std::max(visible.begin, keys_.begin) - keys_.begin;
      for (; begin < end; begin = begin / kTileN * kTileN + kTileN) {
        const int64_t tile = begin / kTileN * kTileN;
        visit(row, tile, Range{begin - tile, std::min(end - tile, kTileN)});
      }
    }
  }

  // The first tile from a strip on; its strip is num_strips_ when there is none.
  Tile first_tile(int64_t strip) const {
    while (strip < num_strips_ && strip_tiles_[strip].empty()) ++strip;
    return {strip, strip < num_strips_ ? strip_tiles_[strip].begin : 0};
  }

  Range strip_rows(const QueryBlock& queries, int64_t strip) const {
    const int64_t begin = queries.rows.begin + strip * kTileM;
    return {begin, std::min(begin + kTileM, queries.rows.end)};
  }

  void add_visible_to_dk_dv(const QueryBlock& queries, const Mask& mask, float* dk, float* dv,
                            int64_t stride) const {
    for_each_visible(queries, mask, [&](int64_t row, int64_t tile, Range keys) {
      const float* p = Operands::panel_from(p_, block_m_, row, tile).data;
      const float* ds = Operands::panel_from(ds_panels_, block_m_, row, tile).data;
      for (int64_t x = 0; x < d_; ++x) {
        const float dout = dout_.data[row * dout_.stride + x], q = q_.data[row * q_.stride + x];
        float* dv_x = dv + x * stride + tile;
        float* dk_x = dk + x * stride + tile;
        for (int64_t key = keys.begin; key < keys.end; ++key) {
          dv_x[key] += dout * p[key];
          dk_x[key] += q * ds[key];
        }
      }
    });
  }

  void add_visible_to_dq(const QueryBlock& queries, const Mask& mask, float* dq, int64_t stride,
                         bool accumulate) const {
    if (!accumulate) std::memset(dq, 0, num_strips_ * kTileM * stride * sizeof(float));
    for_each_visible(queries, mask, [&](int64_t row, int64_t tile, Range keys) {
      const float* ds = Operands::rows_from(ds_, row, tile).data;
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        const float* k = Operands::wide_from(k_rows_, tile + key).data;
        for (int64_t x = 0; x < d_; ++x) dq[row * stride + x] += ds[key] * k[x];
      }
    });
  }

  void start_products(Tile tile, int buffer) {
    const int64_t row = tile.strip * kTileM, key = tile.index * kTileN;
    products_.start(depth_, Operands::rows_from(q_, row, 0),
                    Operands::panel_from(k_scores_, depth_, 0, key), scores_[buffer],
                    Operands::rows_from(dout_, row, 0),
                    Operands::panel_from(v_scores_, depth_, 0, key), dp_[buffer]);
  }

  void finish(const QueryBlock& queries, const Mask& mask, const Dropout& dropout, Tile tile,
              int buffer) {
    const Range rows = strip_rows(queries, tile.strip), tiles = strip_tiles_[tile.strip];
    const int64_t row = tile.strip * kTileM, key = tile.index * kTileN;
    const int64_t first_key = keys_.begin + key;
    const Range all = mask.all_visible_keys(rows);
    const bool masked = first_key < all.begin || first_key + kTileN > all.end;
    if (masked) find_visible(mask, rows, first_key);
    const ScoreRule& rule = queries.rule;
    if (rule.rewrites()) {
      rewrite_scores<kTileM, kTileN>(rule, rows.begin + mask.offset() - first_key, scores_[buffer],
                                     derivative_);
    }
    if (dropout.enabled() && tile.index == tiles.begin) {
      // Whole tiles: rows beyond the last have a p of 0, which must not meet a factor of NaN.
      const Range whole{rows.begin, rows.begin + kTileM};
      const Range keys{keys_.begin + tiles.begin * kTileN, keys_.begin + tiles.end * kTileN};
      fill_dropout_factors(dropout, queries.batch, queries.head, whole, keys, dropout_);
    }
    const bool has_softcap = rule.softcap > 0.0f, has_dropout = dropout.enabled();
    finish_tile<kNumParts>({.scores = scores_[buffer],
                            .dp = dp_[buffer],
                            .lse = queries.lse + row,
                            .softmax_d = queries.softmax_d + row,
                            .exponent_scale = rule.exponent_scale,
                            .softmax_scale = queries.softmax_scale,
                            .derivative = has_softcap ? derivative_ : ones_,
                            .derivative_stride = has_softcap ? kTileN : 0,
                            .dropout = has_dropout ? dropout_.at(rows.begin, first_key) : ones_,
                            .dropout_stride = has_dropout ? dropout_.stride : 0,
                            .visible_begin = visible_begin_,
                            .visible_end = visible_end_,
                            .p_panel = Operands::panel_from(p_, block_m_, row, key),
                            .ds_panel = Operands::panel_from(ds_panels_, block_m_, row, key),
                            .ds_rows = Operands::rows_from(ds_, row, key)},
                           masked, has_softcap || has_dropout, products_);
  }

  // The keys that each row sees, counted from `key`.
  void find_visible(const Mask& mask, Range rows, int64_t key) {
    for (int64_t i = 0; i < kTileM; ++i) {
      Range visible;
      if (i < rows.size()) visible = mask.visible_keys(rows.begin + i);
      visible_begin_[i] =
          static_cast<int32_t>(std::min(std::max<int64_t>(visible.begin - key, 0), kTileN));
      visible_end_[i] =
          static_cast<int32_t>(std::min(std::max<int64_t>(visible.end - key, 0), kTileN));
    }
  }

  const int64_t block_m_, d_, depth_, width_;
  Range keys_;            // of the block, within the sequence
  int64_t num_keys_ = 0;  // whole tiles
  int64_t num_strips_ = 0;
  Range strip_tiles_[kMaxStrips];  // tiles with scores in each strip

  Matrix k_scores_, v_scores_;  // panels, (depth, keys)
  Matrix k_rows_;               // wide, (keys, head dimension)
  Matrix q_, dout_;             // rows, (queries, head dimension)
  Matrix q_columns_, dout_columns_;
  Matrix p_, ds_panels_;  // panels, (queries, keys)
  Matrix ds_;             // rows, (queries, keys)
  typename Operands::ScoreProducts products_;
  float *scores_[2], *dp_[2];              // the tile that is finished and the next one
  float* derivative_;                      // of a tile
  float* ones_;                            // one row of a tile
  DropoutFactors dropout_{};               // one strip
  int32_t *visible_begin_, *visible_end_;  // rows of a tile
};

}  // namespace flash_attn_plus::cpu::FAP_ISA
