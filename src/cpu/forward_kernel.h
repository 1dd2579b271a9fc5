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

#include "cpu/decode_kernel.h"
#include "cpu/forward_strips.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// A task on numbers of type T.
template <typename T, typename Engine>
class ForwardTaskRunner {
 public:
  ForwardTaskRunner(const ForwardParams& params, const Dropout& dropout, const ForwardTask& task,
                    Carver carver)
      : params_(params), task_(task), strips_(params, dropout, task, carver) {
    scratch_bytes_ = carver.used();
  }

  int64_t scratch_bytes() const { return scratch_bytes_; }

  // False, with nothing written, when the engine cannot represent one of the numbers.
  bool run() {
    for (int strip = 0; strip < strips_.num_strips(); ++strip) {
      const T* rows[kStrip];
      const int count = locate_rows(params_.q, strip, rows);
      if (!strips_.engine().pack_queries(strip, rows, count)) return false;
    }
    strips_.clear();
    const Range keys = strips_.mask().any_visible_keys(task_.queries);
    const int64_t first_block = keys.begin / kBlockKeys * kBlockKeys;
    BlockRows next = locate_block(first_block, keys);
    for (int64_t block = first_block; block < keys.end; block += kBlockKeys) {
      const int count = next.count;
      if (!strips_.engine().pack_keys(next.k, next.v, count)) return false;
      next = locate_block(block + kBlockKeys, keys);
      strips_.add_block(block, count, next.prefetcher);
    }
    if (params_.s_dmask != nullptr) write_probabilities(keys);
    strips_.finish();
    for (int strip = 0; strip < strips_.num_strips(); ++strip) {
      T* rows[kStrip];
      const int count = locate_rows(params_.out, strip, rows);
      unpack_columns(strips_.output(strip), kStrip, count, params_.head_dim, rows);
    }
    return true;
  }

 private:
  static constexpr int kStrip = Engine::kStrip;

  // The rows of a strip in q or out; returns how many there are.
  template <typename U>
  int locate_rows(const Operand& x, int strip, U** rows) const {
    const int count = strips_.num_rows_of(strip);
    U* data = static_cast<U*>(x.data) + task_.batch * x.batch_stride;
    for (int i = 0; i < count; ++i) {
      const int row = strip * kStrip + i;
      rows[i] = data + (strips_.sequence().q_begin + strips_.query_of(row)) * x.row_stride +
                strips_.head_of(row) * x.head_stride;
    }
    return count;
  }

  // The rows of a block of keys.
  struct BlockRows {
    int count = 0;
    const T* k[kBlockKeys];
    const T* v[kBlockKeys];
    Prefetcher prefetcher;
  };

  BlockRows locate_block(int64_t block, Range keys) const {
    BlockRows rows;
    rows.count = static_cast<int>(std::clamp<int64_t>(keys.end - block, 0, kBlockKeys));
    rows.prefetcher.clear(params_.head_dim * static_cast<int64_t>(sizeof(T)));
    const int64_t head_k = task_.head / params_.group_size();
    const T* k_head = static_cast<const T*>(params_.k.data) + head_k * params_.k.head_stride;
    const T* v_head = static_cast<const T*>(params_.v.data) + head_k * params_.v.head_stride;
    for (int i = 0; i < rows.count; ++i) {
      const int64_t row = strips_.sequence().k_begin + block + i;
      rows.k[i] = k_head + key_row_offset(params_, params_.k, task_.batch, row);
      rows.v[i] = v_head + key_row_offset(params_, params_.v, task_.batch, row);
      rows.prefetcher.add_row(rows.k[i]);
      rows.prefetcher.add_row(rows.v[i]);
    }
    return rows;
  }

  // s_dmask: the keys go past once more.
  void write_probabilities(Range keys) {
    for (int64_t block = keys.begin / kBlockKeys * kBlockKeys; block < keys.end;
         block += kBlockKeys) {
      const BlockRows block_rows = locate_block(block, keys);
      strips_.engine().pack_keys(block_rows.k, block_rows.v, block_rows.count);
      for (int strip = 0; strip < strips_.num_strips(); ++strip) {
        const auto part = strips_.part_of(strip, block, block_rows.count);
        if (part.begin >= part.end) continue;
        strips_.compute_probabilities(strip, block, part);
        T* rows[kStrip];
        const int count = strips_.num_rows_of(strip);
        for (int i = 0; i < count; ++i) {
          const int row = strip * kStrip + i;
          rows[i] = static_cast<T*>(params_.s_dmask) + task_.batch * params_.s_dmask_batch_stride +
                    strips_.head_of(row) * params_.s_dmask_head_stride +
                    strips_.query_of(row) * params_.s_dmask_row_stride + block + part.begin;
        }
        unpack_columns(strips_.engine().scores(0) + part.begin * kStrip, kStrip, count,
                       std::min(part.end, block_rows.count) - part.begin, rows);
      }
    }
  }

  const ForwardParams& params_;
  const ForwardTask& task_;
  ForwardStrips<Engine> strips_;
  int64_t scratch_bytes_;
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
      params.softmax_lse.set(0, head, row, kInfinity);
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

// Cutting float into three parts costs more than six products save as long as the keys are few.
template <typename T>
FAP_INLINE bool pays_in_parts(const Sequence& sequence) {
  return kParts<T> < 3 || sequence.seqlen_k > 512;
}

template <typename T>
void forward_rows(const ForwardParams& params) {
  const Dropout dropout = make_dropout(params);
  if (params.s_dmask != nullptr) {
    parallel_for(params.num_threads, params.batch * params.num_heads, [&](int64_t index, int) {
      clear_s_dmask<T>(params, index / params.num_heads, index % params.num_heads);
    });
  }
  decode(params);  // sequences of few queries
  if (params.cu_seqlens_q == nullptr && is_decode_sequence(params, params.seqlen_q)) return;
  const ForwardPlan plan(params, max_decode_rows(params));
  clear_unused_rows<T>(params, plan.unused_rows());
  parallel_for(params.num_threads, plan.num_tasks(), [&](int64_t index, int) {
    const ForwardTask& task = plan.task(index);
#if defined(__AVX512BF16__)
    if constexpr (kParts<T> > 0) {
      if (pays_in_parts<T>(sequence_at(params, task.batch)) &&
          run_forward_task<T, BFloat16Engine<kParts<T>>>(params, dropout, task)) {
        return;
      }
    }
#endif
    run_forward_task<T, FloatEngine>(params, dropout, task);
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
