// One task of the forward kernel, apart from the type of its numbers in memory: query rows in
// strips, their running softmax and output, and how a packed block of keys goes past them.
#pragma once

#include <algorithm>

#include "attention/sequence.h"
#include "cpu/forward_engine.h"
#include "cpu/forward_plan.h"
#include "cpu/forward_softmax.h"

namespace flash_attn_plus::cpu::FAP_ISA {

inline constexpr int kBlockKeys = 128;

// Brings the rows of the next block of keys into the second-level cache. They come from far away,
// and a block is read at once when it is packed; a line at a time during the exponentials of the
// block before, they are there by then and nothing has waited.
class Prefetcher {
 public:
  void clear(int64_t row_bytes) {
    row_bytes_ = row_bytes;
    num_rows_ = row_ = lines_ = 0;
    offset_ = 0;
  }
  void add_row(const void* row) { rows_[num_rows_++] = static_cast<const char*>(row); }

  // All lines are to be fetched by so many calls of advance().
  void spread(int64_t calls) {
    const int64_t lines = num_rows_ * ((row_bytes_ + 63) / 64);
    lines_ = static_cast<int>((lines + calls - 1) / std::max<int64_t>(1, calls));
  }
  FAP_INLINE void advance() {
    for (int i = 0; i < lines_ && row_ < num_rows_; ++i) {
      __builtin_prefetch(rows_[row_] + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= row_bytes_) {
        offset_ = 0;
        ++row_;
      }
    }
  }

 private:
  const char* rows_[2 * kBlockKeys];
  int64_t row_bytes_ = 0, offset_ = 0;
  int num_rows_ = 0, row_ = 0, lines_ = 0;
};

template <typename Engine>
class ForwardStrips {
 public:
  static constexpr int kStrip = Engine::kStrip;
  static constexpr int kVectors = kStrip / kLanes;

  ForwardStrips(const ForwardParams& params, const Dropout& dropout, const ForwardTask& task,
                Carver& carver)
      : params_(params),
        dropout_(dropout),
        task_(task),
        sequence_(sequence_at(params, task.batch)),
        mask_(sequence_.mask(params)),
        num_rows_(static_cast<int>(task.num_rows())),
        padded_rows_(static_cast<int>(align_up(num_rows_, kStrip))),
        engine_(carver, params.head_dim, kBlockKeys, padded_rows_),
        output_(carver.take<float>(engine_.output_dim() * padded_rows_)),
        max_(carver.take<float>(padded_rows_)),
        true_max_(carver.take<float>(padded_rows_)),
        sum_(carver.take<float>(padded_rows_)),
        visible_(carver.take<Range>(padded_rows_)) {
    transform_.scale = params.softmax_scale;
    transform_.softcap = params.softcap;
    transform_.alibi = params.alibi_slopes != nullptr;
    factor_ = transform_.factor();
  }

  Engine& engine() { return engine_; }
  const Sequence& sequence() const { return sequence_; }
  const Mask& mask() const { return mask_; }
  int num_strips() const { return padded_rows_ / kStrip; }
  int num_rows_of(int strip) const { return std::min(kStrip, num_rows_ - strip * kStrip); }

  // Row r of the task is query task.queries.begin + r % queries of head task.head + r / queries.
  int64_t query_of(int row) const { return task_.queries.begin + row % task_.queries.size(); }
  int64_t head_of(int row) const { return task_.head + row / task_.queries.size(); }

  // O^T of a strip.
  float* output(int strip) const { return output_ + strip * engine_.output_dim() * kStrip; }

  void clear() {
    for (int row = 0; row < num_rows_; ++row) visible_[row] = mask_.visible_keys(query_of(row));
    for (int row = num_rows_; row < padded_rows_; ++row) visible_[row] = visible_[num_rows_ - 1];
    for (int row = 0; row < padded_rows_; row += kLanes) {
      store(max_ + row, splat(-kInfinity));
      store(true_max_ + row, splat(-kInfinity));
      store(sum_ + row, Vec{});
    }
    std::memset(output_, 0, engine_.output_dim() * padded_rows_ * sizeof(float));
  }

  // The part of a block that a strip works on.
  struct Part {
    int columns;  // rows of the strip, in whole vectors
    int begin,
        end;      // keys of the block, in units that the engine multiplies; empty: none is visible
    bool masked;  // some row of the strip does not see some of the keys
  };

  Part part_of(int strip, int64_t block, int count) const {
    const int columns = std::min(kStrip, num_rows_ - strip * kStrip);
    Range any = {kBlockKeys, 0}, all = {0, kBlockKeys};
    for (int i = 0; i < columns; ++i) {
      const Range visible = visible_[strip * kStrip + i];
      const int64_t begin = std::clamp<int64_t>(visible.begin - block, 0, count);
      const int64_t end = std::clamp<int64_t>(visible.end - block, 0, count);
      all = {std::max(all.begin, begin), std::min(all.end, end)};
      if (begin < end) any = {std::min(any.begin, begin), std::max(any.end, end)};
    }
    Part part;
    part.columns = static_cast<int>(align_up(columns, Engine::kColumns));
    part.begin = static_cast<int>(any.begin / Engine::kKeys * Engine::kKeys);
    part.end = static_cast<int>(align_up(any.end, Engine::kKeys));
    part.masked = all.begin > part.begin || all.end < part.end;
    return part;
  }

  // A block of keys goes past all strips. Where products are stepped, a strip's scores are made
  // while the exponentials of the one before it are.
  void add_block(int64_t block, int count, Prefetcher& prefetcher) {
    prefetcher.spread(int64_t{num_strips()} * count / 2);
    Part part, next_part;
    int strip = next_strip(0, block, count, &part);
    int buffer = 0;
    if (strip < num_strips())
      engine_.start_scores(buffer, strip, part.columns, part.begin, part.end);
    engine_.finish_products();
    while (strip < num_strips()) {
      const int following = next_strip(strip + 1, block, count, &next_part);
      LaneRows lanes[kVectors];
      if (part.masked || !transform_.trivial() || dropout_.enabled()) {
        describe_lanes(strip, block, lanes);
      }
      transform(buffer, part, lanes);
      const int next_buffer = Engine::kStepped ? 1 - buffer : 0;
      const auto start_next = [&] {
        if (following == num_strips()) return;
        engine_.start_scores(next_buffer, following, next_part.columns, next_part.begin,
                             next_part.end);
      };
      if (Engine::kStepped) start_next();

      if (part.columns == kStrip) {
        softmax<kVectors>(buffer, strip, 0, block, part, lanes, output(strip), prefetcher);
      } else {
        for (int v = 0; v < part.columns / kLanes; ++v) {
          softmax<1>(buffer, strip, v, block, part, lanes, output(strip), prefetcher);
        }
      }
      engine_.finish_products();
      if (part.masked && !engine_.values_are_finite()) {
        engine_.add_visible_values(part.columns, part.begin, part.end, lanes, output(strip));
      } else {
        engine_.start_values(buffer, part.columns, part.begin, part.end, output(strip));
      }
      if (!Engine::kStepped) start_next();
      strip = following;
      part = next_part;
      buffer = next_buffer;
    }
    engine_.finish_products();
  }

  // Scores of a part against the maxima that are final now, negative where dropped and 0 where
  // masked: s_dmask's values, in place of the engine's scores.
  void compute_probabilities(int strip, int64_t block, const Part& part) {
    LaneRows lanes[kVectors];
    describe_lanes(strip, block, lanes);
    engine_.start_scores(0, strip, part.columns, part.begin, part.end);
    engine_.finish_products();
    transform(0, part, lanes);
    for (int key = part.begin; key < part.end; ++key) {
      for (int v = 0; v < part.columns / kLanes; ++v) {
        float* p = engine_.scores(0) + key * kStrip + v * kLanes;
        const Vec maximum = load(true_max_ + strip * kStrip + v * kLanes);
        const Vec shift = select(maximum == -kInfinity, Vec{}, maximum);
        const Vec score = load(p);
        const Vec magnitude = exp2(fma(score, splat(factor_), -shift));
        VecU word[4];
        dropout_words(dropout_, lanes[v].dropout, task_.batch, dropout_column_counter(block + key),
                      word);
        const VecI keep = dropout_keeps(dropout_, lanes[v].dropout, word[(key >> 3) & 3]);
        store(p, select(score == -kInfinity, Vec{}, select(keep, magnitude, -magnitude)));
      }
    }
  }

  // Normalises the outputs and writes the log-sum-exps.
  void finish() {
    for (int row = 0; row < padded_rows_; row += kLanes) finish_vector(row);
  }

 private:
  void describe_lanes(int strip, int64_t block, LaneRows* lanes) const {
    for (int v = 0; v < kVectors; ++v) {
      VecI first, last, query, head;
      Vec diagonal, slope;
      for (int i = 0; i < kLanes; ++i) {
        const int row = std::min(strip * kStrip + v * kLanes + i, num_rows_ - 1);
        first[i] =
            static_cast<int>(std::clamp<int64_t>(visible_[row].begin - block, 0, kBlockKeys));
        last[i] = static_cast<int>(std::clamp<int64_t>(visible_[row].end - block, 0, kBlockKeys));
        diagonal[i] = static_cast<float>(query_of(row) + mask_.offset() - block);
        query[i] = static_cast<int32_t>(query_of(row));
        head[i] = static_cast<int32_t>(head_of(row));
        slope[i] = transform_.alibi
                       ? params_.alibi_slopes[task_.batch * params_.alibi_batch_stride +
                                              head_of(row) * params_.alibi_head_stride]
                       : 0.0f;
      }
      lanes[v] = {first, last, diagonal, slope, DropoutLanes::of(query, head)};
    }
  }

  // Transforms and masks the products of a part.
  void transform(int buffer, const Part& part, const LaneRows* lanes) {
    if (transform_.trivial() && !part.masked) return;
    for (int v = 0; v < part.columns / kLanes; ++v) {
      transform_scores(engine_.scores(buffer) + v * kLanes, kStrip, part.begin, part.end,
                       transform_, lanes[v], part.masked);
    }
  }

  SoftmaxState state_of(int row) const { return {max_ + row, true_max_ + row, sum_ + row}; }

  // The first strip from `strip` on that sees one of a block's keys, and its part; num_strips() if
  // there is none.
  int next_strip(int strip, int64_t block, int count, Part* part) const {
    for (; strip < num_strips(); ++strip) {
      *part = part_of(strip, block, count);
      if (part->begin < part->end) break;
    }
    return strip;
  }

  // kN vectors of a strip from vector `first` on.
  template <int kN>
  FAP_INLINE void softmax(int buffer, int strip, int first, int64_t block, const Part& part,
                          const LaneRows* lanes, float* output, Prefetcher& prefetcher) {
    const int column = first * kLanes;
    const float* scores = engine_.scores(buffer) + column;
    const SoftmaxState state = state_of(strip * kStrip + column);
    alignas(64) float alpha[kN * kLanes];
    if (update_maximum<kN>(scores, kStrip, part.begin, part.end, factor_, state, alpha)) {
      Vec factors[kN];
      for (int v = 0; v < kN; ++v) {
        factors[v] = load(alpha + v * kLanes);
        store(state.sum + v * kLanes, load(state.sum + v * kLanes) * factors[v]);
      }
      for (int64_t x = 0; x < engine_.output_dim(); ++x) {
        float* o = output + x * kStrip + column;
        for (int v = 0; v < kN; ++v) store(o + v * kLanes, load(o + v * kLanes) * factors[v]);
      }
    }
    const auto write = [&](int key, int v, Vec even, Vec odd) __attribute__((always_inline)) {
      engine_.write_pair(buffer, key, column + v * kLanes, even, odd);
    };
    // The steps of the products, spread evenly.
    const int num_pairs = (part.end - part.begin) / 2;
    const int num_steps = engine_.num_steps();
    int credit = 0;
    const auto meanwhile = [&]() __attribute__((always_inline)) {
      prefetcher.advance();
      if constexpr (Engine::kStepped) {
        for (credit += num_steps; credit >= num_pairs; credit -= num_pairs) engine_.step();
      }
    };
    if (dropout_.enabled()) {
      exponentiate<kN, Engine::kExpDegree>(scores, kStrip, part.begin, part.end, factor_, state,
                                           &dropout_, lanes + first, task_.batch, block, write,
                                           meanwhile);
    } else {
      exponentiate<kN, Engine::kExpDegree>(scores, kStrip, part.begin, part.end, factor_, state,
                                           nullptr, nullptr, 0, 0, write, meanwhile);
    }
  }

  // Log-sum-exp and normalisation of kLanes rows.
  void finish_vector(int first_row) {
    const Vec maximum = load(max_ + first_row);
    Vec sum = load(sum_ + first_row);
    Vec lse, scale;
    VecI sees_nothing;
    for (int i = 0; i < kLanes; ++i) sees_nothing[i] = visible_[first_row + i].empty() ? -1 : 0;
    if (params_.s_aux == nullptr) {
      lse = fma(maximum, splat(kLn2), log(sum));
      lse = select(maximum == kInfinity, maximum, lse);  // the sum is NaN
      lse = select(sees_nothing, splat(kInfinity), lse);
      scale = dropout_.scale / sum;
    } else {
      Vec sink;
      for (int i = 0; i < kLanes; ++i) {
        const int row = std::min(first_row + i, num_rows_ - 1);
        sink[i] = params_.s_aux[head_of(row) * params_.s_aux_stride];
      }
      const Vec sink_exponent = sink * kLog2E;
      const Vec larger = max(maximum, sink_exponent);
      const Vec shift = select(larger == -kInfinity, Vec{}, larger);
      const Vec weight = exp2(maximum - shift);
      sum = sum * weight + exp2(sink_exponent - shift);
      lse = fma(larger, splat(kLn2), log(sum));
      lse = select(sees_nothing, sink, lse);
      scale = weight * dropout_.scale / sum;
    }
    for (int i = 0; i < kLanes && first_row + i < num_rows_; ++i) {
      const int row = first_row + i;
      params_.softmax_lse.set(task_.batch, head_of(row), sequence_.q_begin + query_of(row), lse[i]);
    }
    float* output =
        output_ + first_row / kStrip * engine_.output_dim() * kStrip + first_row % kStrip;
    for (int64_t x = 0; x < params_.head_dim; ++x) {
      float* o = output + x * kStrip;
      store(o, select(sees_nothing, Vec{}, load(o) * scale));
    }
  }

  const ForwardParams& params_;
  const Dropout& dropout_;
  const ForwardTask& task_;
  const Sequence sequence_;
  const Mask mask_;
  const int num_rows_, padded_rows_;
  Engine engine_;
  float* output_;  // O^T, strip by strip
  float *max_, *true_max_, *sum_;
  Range* visible_;
  ScoreTransform transform_;
  float factor_;
};

}  // namespace flash_attn_plus::cpu::FAP_ISA
