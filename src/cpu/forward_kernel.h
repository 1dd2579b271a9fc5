// Attention forward (FlashAttention-2's online softmax, Dao 2023) for many query rows.
//
// A task (forward_plan.h) is up to 256 query rows that share a key head: q is transposed and packed
// once, then blocks of kBlockKeys keys are packed and go past it, each used by all strips of rows
// that see one of its keys. For a strip and a block: the product K Q^T into a buffer in the
// first-level cache, masks and maxima, exponentials, the product V^T P^T into the strip's output
// (second-level cache). Blocks begin at multiples of kBlockKeys of the sequence and lanes do not
// meet, so that a row's result depends neither on the task it is in nor on the threads.
//
// The bound is the multiply-add units for float, and the exponentials where products run on AMX;
// docs/cpu.md has the figures.
#pragma once

#include "attention/sequence.h"
#include "cpu/decode_kernel.h"
#include "cpu/forward_engine.h"
#include "cpu/forward_plan.h"
#include "cpu/forward_softmax.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu::FAP_ISA {

inline constexpr int kBlockKeys = 128;

template <typename T, typename Engine>
class ForwardTaskRunner {
 public:
  ForwardTaskRunner(const ForwardParams& params, const Dropout& dropout, const ForwardTask& task,
                    Carver carver)
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
    used_ = carver.used();
  }

  int64_t scratch_bytes() const { return used_; }

  // False, with nothing written, when the engine cannot represent one of the numbers.
  bool run() {
    if (!prepare()) return false;
    const Range keys = mask_.any_visible_keys(task_.queries);
    for (int64_t block = keys.begin / kBlockKeys * kBlockKeys; block < keys.end;
         block += kBlockKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockKeys, keys.end - block));
      if (!pack_block(block, count)) return false;
      for (int strip = 0; strip < num_strips(); ++strip) add_block(strip, block, count);
    }
    if (params_.s_dmask != nullptr) write_probabilities(keys);
    finish();
    return true;
  }

 private:
  static constexpr int kStrip = Engine::kStrip;
  static constexpr int kVectors = kStrip / kLanes;

  int num_strips() const { return padded_rows_ / kStrip; }

  // Row r of the task is query task.queries.begin + r % queries of head task.head + r / queries.
  int64_t query_of(int row) const { return task_.queries.begin + row % task_.queries.size(); }
  int64_t head_of(int row) const { return task_.head + row / task_.queries.size(); }

  template <typename U>
  U* row_of(const Operand& x, int row) const {
    return static_cast<U*>(x.data) + task_.batch * x.batch_stride +
           (sequence_.q_begin + query_of(row)) * x.row_stride + head_of(row) * x.head_stride;
  }

  bool prepare() {
    for (int strip = 0; strip < num_strips(); ++strip) {
      const T* rows[kStrip];
      const int count = std::min(kStrip, num_rows_ - strip * kStrip);
      for (int i = 0; i < count; ++i) rows[i] = row_of<const T>(params_.q, strip * kStrip + i);
      if (!engine_.pack_queries(strip, rows, count)) return false;
    }
    for (int row = 0; row < num_rows_; ++row) visible_[row] = mask_.visible_keys(query_of(row));
    for (int row = num_rows_; row < padded_rows_; ++row) visible_[row] = visible_[num_rows_ - 1];
    for (int row = 0; row < padded_rows_; row += kLanes) {
      store(max_ + row, splat(-kInfinity));
      store(true_max_ + row, splat(-kInfinity));
      store(sum_ + row, Vec{});
    }
    std::memset(output_, 0, engine_.output_dim() * padded_rows_ * sizeof(float));
    return true;
  }

  bool pack_block(int64_t block, int count) {
    const T* k[kBlockKeys];
    const T* v[kBlockKeys];
    const int64_t head_k = task_.head / params_.group_size();
    const T* k_head = static_cast<const T*>(params_.k.data) + head_k * params_.k.head_stride;
    const T* v_head = static_cast<const T*>(params_.v.data) + head_k * params_.v.head_stride;
    for (int i = 0; i < count; ++i) {
      const int64_t row = sequence_.k_begin + block + i;
      k[i] = k_head + key_row_offset(params_, params_.k, task_.batch, row);
      v[i] = v_head + key_row_offset(params_, params_.v, task_.batch, row);
    }
    return engine_.pack_keys(k, v, count);
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

  // Scores of a part, transformed and masked.
  void score(int strip, const Part& part, const LaneRows* lanes) {
    engine_.compute_scores(strip, part.columns, part.begin, part.end);
    if (transform_.trivial() && !part.masked) return;
    for (int v = 0; v < part.columns / kLanes; ++v) {
      transform_scores(engine_.scores() + v * kLanes, kStrip, part.begin, part.end, transform_,
                       lanes[v], part.masked);
    }
  }

  SoftmaxState state_of(int row) const { return {max_ + row, true_max_ + row, sum_ + row}; }

  void add_block(int strip, int64_t block, int count) {
    const Part part = part_of(strip, block, count);
    if (part.begin >= part.end) return;
    LaneRows lanes[kVectors];
    if (part.masked || !transform_.trivial() || dropout_.enabled()) {
      describe_lanes(strip, block, lanes);
    }
    score(strip, part, lanes);

    float* output = output_ + strip * engine_.output_dim() * kStrip;
    if (part.columns == kStrip) {
      softmax<kVectors>(strip, 0, block, part, lanes, output);
    } else {
      for (int v = 0; v < part.columns / kLanes; ++v) {
        softmax<1>(strip, v, block, part, lanes, output);
      }
    }
    if (part.masked && !engine_.values_are_finite()) {
      engine_.add_visible_values(part.columns, part.begin, part.end, lanes, output);
    } else {
      engine_.add_values(part.columns, part.begin, part.end, output);
    }
  }

  // kN vectors of a strip from vector `first` on.
  template <int kN>
  FAP_INLINE void softmax(int strip, int first, int64_t block, const Part& part,
                          const LaneRows* lanes, float* output) {
    const int column = first * kLanes;
    const float* scores = engine_.scores() + column;
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
      engine_.write_pair(key, column + v * kLanes, even, odd);
    };
    if (dropout_.enabled()) {
      exponentiate<kN, Engine::kExpDegree>(scores, kStrip, part.begin, part.end, factor_, state,
                                           &dropout_, lanes + first, task_.batch, block, write);
    } else {
      exponentiate<kN, Engine::kExpDegree>(scores, kStrip, part.begin, part.end, factor_, state,
                                           nullptr, nullptr, 0, 0, write);
    }
  }

  // s_dmask: the scores once more, against the maxima that are final now.
  void write_probabilities(Range keys) {
    for (int64_t block = keys.begin / kBlockKeys * kBlockKeys; block < keys.end;
         block += kBlockKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kBlockKeys, keys.end - block));
      pack_block(block, count);
      for (int strip = 0; strip < num_strips(); ++strip) {
        const Part part = part_of(strip, block, count);
        if (part.begin >= part.end) continue;
        LaneRows lanes[kVectors];
        describe_lanes(strip, block, lanes);
        score(strip, part, lanes);
        float* scores = engine_.scores();
        for (int key = part.begin; key < part.end; ++key) {
          for (int v = 0; v < part.columns / kLanes; ++v) {
            float* p = scores + key * kStrip + v * kLanes;
            const Vec maximum = load(true_max_ + strip * kStrip + v * kLanes);
            const Vec shift = select(maximum == -kInfinity, Vec{}, maximum);
            const Vec magnitude = exp2(fma(load(p), splat(factor_), -shift));
            VecU word[4];
            dropout_words(dropout_, lanes[v].dropout, task_.batch,
                          dropout_column_counter(block + key), word);
            const VecI keep = dropout_keeps(dropout_, lanes[v].dropout, word[(key >> 3) & 3]);
            store(p, select(keep, magnitude, -magnitude));
          }
        }
        T* rows[kStrip];
        const int num = std::min(kStrip, num_rows_ - strip * kStrip);
        for (int i = 0; i < num; ++i) {
          const int row = strip * kStrip + i;
          rows[i] = static_cast<T*>(params_.s_dmask) + task_.batch * params_.s_dmask_batch_stride +
                    head_of(row) * params_.s_dmask_head_stride +
                    query_of(row) * params_.s_dmask_row_stride + block + part.begin;
        }
        unpack_columns(scores + part.begin * kStrip, kStrip, num,
                       std::min(part.end, count) - part.begin, rows);
      }
    }
  }

  void finish() {
    for (int row = 0; row < padded_rows_; row += kLanes) finish_vector(row);
    for (int strip = 0; strip < num_strips(); ++strip) {
      T* rows[kStrip];
      const int count = std::min(kStrip, num_rows_ - strip * kStrip);
      for (int i = 0; i < count; ++i) rows[i] = row_of<T>(params_.out, strip * kStrip + i);
      unpack_columns(output_ + strip * engine_.output_dim() * kStrip, kStrip, count,
                     params_.head_dim, rows);
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
      params_.softmax_lse
          .data[task_.batch * params_.softmax_lse.batch_stride +
                head_of(row) * params_.softmax_lse.head_stride +
                (sequence_.q_begin + query_of(row)) * params_.softmax_lse.row_stride] = lse[i];
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
  int64_t used_;
};

template <typename T, typename Engine>
bool run_forward_task(const ForwardParams& params, const Dropout& dropout,
                      const ForwardTask& task) {
  using Runner = ForwardTaskRunner<T, Engine>;
  const int64_t bytes = Runner(params, dropout, task, Carver(nullptr)).scratch_bytes();
  return Runner(params, dropout, task, Carver(thread_scratch(static_cast<size_t>(bytes)))).run();
}

// Rows of q that belong to no sequence: out 0, log-sum-exp +inf.
template <typename T>
void clear_unused_rows(const ForwardParams& params, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t head = 0; head < params.num_heads; ++head) {
      std::memset(static_cast<T*>(params.out.data) + row * params.out.row_stride +
                      head * params.out.head_stride,
                  0, params.head_dim * sizeof(T));
      params.softmax_lse
          .data[head * params.softmax_lse.head_stride + row * params.softmax_lse.row_stride] =
          kInfinity;
    }
  }
}

template <typename T>
void clear_s_dmask(const ForwardParams& params, int64_t batch, int64_t head) {
  for (int64_t row = 0; row < params.s_dmask_rows; ++row) {
    std::memset(static_cast<T*>(params.s_dmask) + batch * params.s_dmask_batch_stride +
                    head * params.s_dmask_head_stride + row * params.s_dmask_row_stride,
                0, params.s_dmask_cols * sizeof(T));
  }
}

template <typename T>
void forward_rows(const ForwardParams& params) {
  const Dropout dropout = make_dropout(params.dropout_p, params.seed, params.offset);
  if (params.s_dmask != nullptr) {
    parallel_for(params.num_threads, params.batch * params.num_heads, [&](int64_t index, int) {
      clear_s_dmask<T>(params, index / params.num_heads, index % params.num_heads);
    });
  }
  decode(params);  // sequences of few queries
  const ForwardPlan plan(params, max_decode_rows(params));
  for (int i = 0; i < ForwardPlan::kNumUnused; ++i) {
    clear_unused_rows<T>(params, plan.unused_rows(i));
  }
  parallel_for(params.num_threads, plan.num_tasks(), [&](int64_t index, int) {
    const ForwardTask& task = plan.task(index);
#if defined(__AVX512BF16__)
    if constexpr (kParts<T> > 0) {
      if (run_forward_task<T, BFloat16Engine<T>>(params, dropout, task)) return;
    }
#endif
    run_forward_task<T, FloatEngine<T>>(params, dropout, task);
  });
}

inline void forward(const ForwardParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return forward_rows<float>(params);
    case DType::kFloat16:
      return forward_rows<Half>(params);
    case DType::kBFloat16:
      return forward_rows<BFloat16>(params);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
