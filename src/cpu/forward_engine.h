// The two products of the forward kernel and the operands that they read, in two forms: as float,
// and as bf16 parts. Everything is transposed, lanes being query rows:
//
//   scores   S^T (keys, rows)  = K Q^T
//   output   O^T (d, rows)    += V^T P^T
//
// A strip is the columns, that is query rows, that one pass over the keys of a block makes.
#pragma once

#include "cpu/gemm.h"
#include "cpu/gemm_bf16.h"
#include "cpu/pack.h"

namespace flash_attn_plus::cpu::FAP_ISA {

constexpr int64_t align_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Cuts up a piece of memory; counts only, when it has none.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename U>
  U* take(int64_t count) {
    U* result = memory_ == nullptr ? nullptr : reinterpret_cast<U*>(memory_ + used_);
    used_ += align_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// As float. K and V are read as they are packed, row by row; only Q is transposed. P replaces S.
class FloatEngine {
 public:
  static constexpr int kStrip = kPanel;
  static constexpr int kColumns = kLanes;  // a strip may be cut to a multiple of this
  static constexpr int kKeys = 2;          // ranges of keys begin and end at multiples of this
  static constexpr bool kStepped = false;  // whether products run beside the exponentials
  static constexpr int kExpDegree = 5;

  FloatEngine(Carver& carver, int64_t head_dim, int64_t block_keys, int64_t rows)
      : head_dim_(head_dim),
        stride_(align_up(head_dim, kLanes)),
        q_(carver.take<float>(rows * head_dim)),
        k_(carver.take<float>(block_keys * stride_)),
        v_(carver.take<float>(block_keys * stride_)),
        scores_(carver.take<float>(block_keys * kStrip)) {}

  // Rows of the output accumulator.
  int64_t output_dim() const { return head_dim_; }
  float* scores(int) const { return scores_; }
  bool values_are_finite() const { return values_are_finite_; }

  // All that pack say whether the engine can go on with these numbers.
  template <typename T>
  bool pack_queries(int strip, const T* const* rows, int count) {
    pack_columns(rows, count, head_dim_, kStrip, q_ + strip * head_dim_ * kStrip, kStrip);
    return true;
  }
  template <typename T>
  bool pack_keys(const T* const* k, const T* const* v, int count) {
    pack_rows(k, count, head_dim_, stride_, k_, stride_);
    values_are_finite_ = pack_rows(v, count, head_dim_, stride_, v_, stride_);
    for (int i = count; i < align_up(count, kKeys); ++i) {
      for (int64_t x = 0; x < stride_; x += kLanes) {
        store(k_ + i * stride_ + x, Vec{});
        store(v_ + i * stride_ + x, Vec{});
      }
    }
    return true;
  }

  void start_scores(int, int strip, int columns, int begin, int end) {
    gemm<false>(end - begin, columns, static_cast<int>(head_dim_), k_ + begin * stride_, stride_,
                q_ + strip * head_dim_ * kStrip, kStrip, scores_ + begin * kStrip, kStrip, false);
  }

  FAP_INLINE void write_pair(int, int key, int column, Vec even, Vec odd) const {
    store(scores_ + key * kStrip + column, even);
    store(scores_ + (key + 1) * kStrip + column, odd);
  }

  void start_values(int, int columns, int begin, int end, float* output) {
    gemm<true>(static_cast<int>(head_dim_), columns, end - begin, v_ + begin * stride_, stride_,
               scores_ + begin * kStrip, kStrip, output, kStrip, true);
  }

  static int num_steps() { return 0; }
  static void step() {}
  static void finish_products() {}

  // start_values() for values with inf or NaN, which count only where a row sees the key: rows[i]
  // are the lanes of vector i.
  template <typename Rows>
  void add_visible_values(int columns, int begin, int end, const Rows* rows, float* output) {
    for (int key = begin; key < end; ++key) {
      for (int column = 0; column < columns; column += kLanes) {
        const Rows& lanes = rows[column / kLanes];
        const VecI visible = (key >= lanes.first) & (key < lanes.last);
        const Vec p = load(scores_ + key * kStrip + column);
        for (int64_t x = 0; x < head_dim_; ++x) {
          float* o = output + x * kStrip + column;
          store(o, select(visible, fma(splat(v_[key * stride_ + x]), p, load(o)), load(o)));
        }
      }
    }
  }

 private:
  int64_t head_dim_, stride_;
  float *q_, *k_, *v_, *scores_;
  bool values_are_finite_ = true;
};

#if defined(__AVX512BF16__)

// As bf16 parts, on tiles or with dot products. On tiles the products run beside the exponentials:
// of the next strip's scores and the last one's output, while this strip's are made into P. There
// are two buffers of scores and of P for that.
template <int kNumParts>
class BFloat16Engine {
 public:
  static constexpr bool kStepped = SteppedProduct<kNumParts>::kStepped;
  static constexpr int kStrip = kStepped ? 32 : 64;
  static constexpr int kColumns = kStrip;
  static constexpr int kKeys = kGemmDepth;
  static constexpr int kExpDegree = kNumParts == 1 ? 3 : kNumParts == 2 ? 4 : 5;

  BFloat16Engine(Carver& carver, int64_t head_dim, int64_t block_keys, int64_t rows)
      : head_dim_(head_dim),
        depth_(align_up(head_dim, 32)),
        block_keys_(block_keys),
        q_(carver.take<BFloat16>(kNumParts * rows * depth_)),
        k_(carver.take<BFloat16>(kNumParts * block_keys * depth_)),
        v_(carver.take<BFloat16>(kNumParts * block_keys * output_dim())) {
    for (int buffer = 0; buffer < kNumBuffers; ++buffer) {
      scores_[buffer] = carver.take<float>(block_keys * kStrip);
      p_[buffer] = carver.take<BFloat16>(kNumParts * block_keys * kStrip);
    }
  }

  int64_t output_dim() const { return align_up(head_dim_, 16); }
  float* scores(int buffer) const { return scores_[buffer]; }
  static constexpr bool values_are_finite() { return true; }

  // A single part is the number itself, inf and NaN included; but values that are not finite must
  // not meet a p of 0.
  template <typename T>
  bool pack_queries(int strip, const T* const* rows, int count) {
    return pack_b_columns<kNumParts>(rows, count, head_dim_, depth_, kStrip,
                                     q_ + strip * kNumParts * depth_ * kStrip, 2 * kStrip,
                                     depth_ * kStrip) ||
           kNumParts == 1;
  }
  template <typename T>
  bool pack_keys(const T* const* k, const T* const* v, int count) {
    const int padded = static_cast<int>(align_up(count, 32));
    const bool finite_k =
        pack_a_rows<kNumParts>(k, count, head_dim_, depth_, k_, depth_, block_keys_ * depth_);
    for (int part = 0; part < kNumParts; ++part) {
      std::memset(k_ + (part * block_keys_ + count) * depth_, 0,
                  (padded - count) * depth_ * sizeof(BFloat16));
    }
    return pack_a_columns<kNumParts>(v, count, head_dim_, output_dim(), padded, v_, block_keys_,
                                     block_keys_ * output_dim()) &&
           (finite_k || kNumParts == 1);
  }

  void start_scores(int buffer, int strip, int, int begin, int end) {
    scores_product_.start(end - begin, static_cast<int>(depth_),
                          {k_ + begin * depth_, depth_, block_keys_ * depth_},
                          {q_ + strip * kNumParts * depth_ * kStrip, 2 * kStrip, depth_ * kStrip},
                          scores_[buffer] + begin * kStrip, kStrip, false);
  }

  FAP_INLINE void write_pair(int buffer, int key, int column, Vec even, Vec odd) const {
    VecU pair[kNumParts];
    split_pair(even, odd, pair);
#pragma GCC unroll 3
    for (int part = 0; part < kNumParts; ++part) {
      store(p_[buffer] + part * block_keys_ * kStrip + key * kStrip + 2 * column, pair[part]);
    }
  }

  void start_values(int buffer, int, int begin, int end, float* output) {
    values_product_.start(static_cast<int>(output_dim()), end - begin,
                          {v_ + begin, block_keys_, block_keys_ * output_dim()},
                          {p_[buffer] + begin * kStrip, 2 * kStrip, block_keys_ * kStrip}, output,
                          kStrip, true);
  }
  template <typename Rows>
  void add_visible_values(int, int, int, const Rows*, float*) {}

  // Values come first, being older.
  int num_steps() const { return values_product_.num_steps() + scores_product_.num_steps(); }
  FAP_INLINE void step() {
    if (!values_product_.finished()) {
      values_product_.step();
    } else if (!scores_product_.finished()) {
      scores_product_.step();
    }
  }
  void finish_products() {
    values_product_.finish();
    scores_product_.finish();
  }

 private:
  static constexpr int kNumBuffers = kStepped ? 2 : 1;

  AmxTiles tiles_;
  int64_t head_dim_, depth_, block_keys_;
  BFloat16 *q_, *k_, *v_, *p_[kNumBuffers];
  float* scores_[kNumBuffers];
  SteppedProduct<kNumParts> scores_product_, values_product_;
};

#endif  // __AVX512BF16__

}  // namespace flash_attn_plus::cpu::FAP_ISA
