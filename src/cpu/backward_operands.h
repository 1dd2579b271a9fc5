// The operands of the backward products: how q, k, v, dout and the probabilities of a block are
// laid out for the products of gemm.h and gemm_bf16.h. One struct for each way to multiply, named
// by the number of bf16 parts that a number is multiplied in, 0 meaning float.
//
// "Rows" is a left operand, row-major; "columns" the same matrix transposed, a left operand too. A
// "panel" is a right operand of kTileN columns, contiguous; a "wide" right operand has all columns
// of a matrix. In the bf16 forms right operands hold pairs of successive rows, and padding is 0.
#pragma once

#include <type_traits>

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/gemm_bf16.h"
#include "cpu/pack.h"

namespace flash_attn_plus::cpu::FAP_ISA {

FAP_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Elements between rows: an odd number of cache lines (16 units of 4 bytes), lest the rows of a
// block crowd into a few sets of the cache.
FAP_INLINE int64_t odd_stride(int64_t units) { return (round_up(units, 16) / 16 | 1) * 16; }

// The two products of a tile of scores, S = Q K^T and dP = dO V^T, made when they are started.
template <typename Operands>
class ImmediateProducts {
 public:
  using Matrix = typename Operands::Matrix;
  void start(int64_t depth, Matrix q, Matrix k, float* scores, Matrix dout, Matrix v, float* dp) {
    constexpr int64_t m = Operands::kTileM, n = Operands::kTileN;
    Operands::multiply_rows(m, n, depth, q, k, scores, n, false);
    Operands::multiply_rows(m, n, depth, dout, v, dp, n, false);
  }
  FAP_INLINE void advance() {}
  FAP_INLINE void complete() {}
};

#if defined(__AMX_BF16__)

// The same for a tile unit that works beside the vector units: `advance` is called kUnits times
// while the tile before is being finished and does its share of the steps each time.
template <typename Operands>
class SteppedProducts {
 public:
  using Matrix = typename Operands::Matrix;
  static constexpr int kUnits = Operands::kTileM / 2 * (Operands::kTileN / kLanes);

  FAP_INLINE void start(int64_t depth, Matrix q, Matrix k, float* scores, Matrix dout, Matrix v,
                        float* dp) {
    start(scores_, depth, q, k, scores);
    start(dp_, depth, dout, v, dp);
    num_steps_ = scores_.num_steps() + dp_.num_steps();
    credit_ = 0;
  }
  FAP_INLINE void advance() {
    for (credit_ += num_steps_; credit_ >= kUnits; credit_ -= kUnits) {
      if (!scores_.finished()) {
        scores_.step();
      } else if (!dp_.finished()) {
        dp_.step();
      }
    }
  }
  FAP_INLINE void complete() {
    scores_.finish();
    dp_.finish();
    num_steps_ = 0;
  }

 private:
  using Product = SteppedProduct<Operands::kParts>;

  static FAP_INLINE void start(Product& product, int64_t depth, Matrix a, Matrix b, float* c) {
    product.start(Operands::kTileM, static_cast<int>(depth), {a.data, a.stride, a.part_stride},
                  {b.data, b.stride, b.part_stride}, c, Operands::kTileN, false);
  }

  Product scores_, dp_;
  int num_steps_ = 0;  // of both
  int credit_ = 0;
};

#endif

template <int kNumParts>
struct BackwardOperands;

template <>
struct BackwardOperands<0> {
  using ScoreProducts = ImmediateProducts<BackwardOperands>;
  static constexpr int kTileM = 4 * kMicroRows;  // queries of a tile of scores
  static constexpr int kTileN = kPanel;          // its keys

  struct Matrix {
    float* data;
    int64_t stride;
  };

  // Head dimension as the depth or the rows of a product, and as its columns.
  static FAP_INLINE int64_t depth(int64_t head_dim) { return head_dim; }
  static FAP_INLINE int64_t width(int64_t head_dim) { return round_up(head_dim, kLanes); }

  template <typename Memory>
  static FAP_INLINE Matrix make_rows(Memory& memory, int64_t rows, int64_t columns) {
    const int64_t stride = odd_stride(columns);
    return {memory.template take<float>(rows * stride), stride};
  }
  // Columns are rows read the other way.
  template <typename Memory>
  static FAP_INLINE Matrix make_columns(Memory&, Matrix rows, int64_t, int64_t) {
    return rows;
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_panels(Memory& memory, int64_t rows, int64_t columns) {
    return {memory.template take<float>(rows * columns), kTileN};
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_wide(Memory& memory, int64_t rows, int64_t columns) {
    return make_rows(memory, rows, columns);
  }

  // A matrix from one of its elements on: of rows; of columns, counted in the source; of panels
  // that have `depth` rows each, at the first column of one of them; of a wide one.
  static FAP_INLINE Matrix rows_from(Matrix x, int64_t row, int64_t column) {
    return {x.data + row * x.stride + column, x.stride};
  }
  static FAP_INLINE Matrix columns_from(Matrix x, int64_t row) {
    return {x.data + row * x.stride, x.stride};
  }
  static FAP_INLINE Matrix panel_from(Matrix x, int64_t depth, int64_t row, int64_t column) {
    return {x.data + column * depth + row * kTileN, x.stride};
  }
  static FAP_INLINE Matrix wide_from(Matrix x, int64_t row) {
    return {x.data + row * x.stride, x.stride};
  }

  // C (m, n) = or += A (m, k) B (k, n), A in rows or in columns.
  static FAP_INLINE void multiply_rows(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b,
                                       float* c, int64_t ldc, bool accumulate) {
    gemm<false>(m, n, k, a.data, a.stride, b.data, b.stride, c, ldc, accumulate);
  }
  static FAP_INLINE void multiply_columns(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b,
                                          float* c, int64_t ldc, bool accumulate) {
    gemm<true>(m, n, k, a.data, a.stride, b.data, b.stride, c, ldc, accumulate);
  }

  // `count` rows of d elements, followed by rows of 0 up to num_rows. Whether all are finite.
  template <typename T>
  static bool pack_rows_and_columns(const T* const* rows, int64_t num_rows, int64_t d, Matrix out,
                                    Matrix) {
    return pack_rows(rows, num_rows, d, width(d), out.data, out.stride);
  }
  template <typename T>
  static bool pack_wide(const T* const* rows, int64_t num_rows, int64_t d, Matrix out) {
    return pack_rows(rows, num_rows, d, width(d), out.data, out.stride);
  }
  // The transposed, as panels: kTileN rows each.
  template <typename T>
  static bool pack_transposed(const T* const* rows, int64_t num_rows, int64_t d, Matrix out) {
    bool finite = true;
    for (int64_t row = 0; row < num_rows; row += kTileN) {
      finite &=
          pack_columns(rows + row, kTileN, d, kTileN, panel_from(out, d, 0, row).data, kTileN);
    }
    return finite;
  }

  // A vector of rows `row` and `row + 1` of a panel, `row` even; and of rows.
  static FAP_INLINE void store_panel(Vec x0, Vec x1, Matrix panel, int64_t row, int64_t column) {
    float* p = panel.data + row * kTileN + column;
    store(p, x0);
    store(p + kTileN, x1);
  }
  static FAP_INLINE void store_panel_and_rows(Vec x0, Vec x1, Matrix panel, Matrix rows,
                                              int64_t row, int64_t column) {
    store_panel(x0, x1, panel, row, column);
    float* p = rows.data + row * rows.stride + column;
    store(p, x0);
    store(p + rows.stride, x1);
  }
};

#if defined(__AVX512BF16__)

template <int kNumParts>
struct BackwardOperands {
  static constexpr int kParts = kNumParts;
#if defined(__AMX_BF16__)
  // The tiles of one part take so short that interleaving costs more than it hides.
  using ScoreProducts = std::conditional_t<kNumParts == 1, ImmediateProducts<BackwardOperands>,
                                           SteppedProducts<BackwardOperands>>;
  static constexpr int kTileM = 32;
  static constexpr int kTileN = 32;
#else
  using ScoreProducts = ImmediateProducts<BackwardOperands>;
  static constexpr int kTileM = 24;
  static constexpr int kTileN = 64;
#endif

  struct Matrix {
    BFloat16* data;
    int64_t stride;  // bf16 numbers between rows, of right operands between pairs of rows
    int64_t part_stride;
  };

  static FAP_INLINE int64_t depth(int64_t head_dim) { return round_up(head_dim, 32); }
  static FAP_INLINE int64_t width(int64_t head_dim) { return round_up(head_dim, 32); }

  template <typename Memory>
  static FAP_INLINE Matrix make(Memory& memory, int64_t rows, int64_t stride) {
    return {memory.template take<BFloat16>(kNumParts * rows * stride), stride, rows * stride};
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_rows(Memory& memory, int64_t rows, int64_t columns) {
    return make(memory, rows, 2 * odd_stride(columns / 2));
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_columns(Memory& memory, Matrix, int64_t rows, int64_t columns) {
    return make(memory, columns, 2 * odd_stride(rows / 2));
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_panels(Memory& memory, int64_t rows, int64_t columns) {
    Matrix panels = make(memory, columns, rows);
    panels.stride = 2 * kTileN;
    return panels;
  }
  template <typename Memory>
  static FAP_INLINE Matrix make_wide(Memory& memory, int64_t rows, int64_t columns) {
    return make(memory, rows / 2, 2 * odd_stride(columns));
  }

  static FAP_INLINE Matrix from(Matrix x, int64_t offset) {
    return {x.data + offset, x.stride, x.part_stride};
  }
  static FAP_INLINE Matrix rows_from(Matrix x, int64_t row, int64_t column) {
    return from(x, row * x.stride + column);
  }
  static FAP_INLINE Matrix columns_from(Matrix x, int64_t row) { return from(x, row); }
  static FAP_INLINE Matrix panel_from(Matrix x, int64_t depth, int64_t row, int64_t column) {
    return from(x, column * depth + row * kTileN);
  }
  static FAP_INLINE Matrix wide_from(Matrix x, int64_t row) { return from(x, row / 2 * x.stride); }

  static FAP_INLINE void multiply_rows(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b,
                                       float* c, int64_t ldc, bool accumulate) {
    gemm<kNumParts>(m, n, k, {a.data, a.stride, a.part_stride}, {b.data, b.stride, b.part_stride},
                    c, ldc, accumulate);
  }
  static FAP_INLINE void multiply_columns(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b,
                                          float* c, int64_t ldc, bool accumulate) {
    multiply_rows(m, n, k, a, b, c, ldc, accumulate);
  }

  template <typename T>
  static bool pack_rows_and_columns(const T* const* rows, int64_t num_rows, int64_t d, Matrix out,
                                    Matrix columns) {
    if constexpr (kNumParts == 1) {
      return copy_rows_and_columns(rows, num_rows, d, out, columns);
    } else {
      return split_rows_and_columns(rows, num_rows, d, out, columns);
    }
  }
  // 32 rows by 16 columns at a time.
  template <typename T>
  static bool split_rows_and_columns(const T* const* rows, int64_t num_rows, int64_t d, Matrix out,
                                     Matrix columns) {
    Vec probe{};
    for (int64_t c = 0; c < width(d); c += 16) {
      for (int64_t row = 0; row < num_rows; row += 32) {
        VecI pairs[kNumParts][16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t r = row + 2 * i;
          Vec x0{}, x1{};
          if (r < num_rows) {
            x0 = load_row(rows[r], c, d);
            x1 = load_row(rows[r + 1], c, d);
            probe = probe_parts(x1, probe_parts(x0, probe));
          }
#pragma GCC unroll 3
          for (int part = 0; part < kNumParts; ++part) {
            const __m512i halves = take_part(x0, x1);
            pairs[part][i] = (VecI)interleave(halves);
            if (r < num_rows) {
              BFloat16* p = out.data + part * out.part_stride + r * out.stride + c;
              store(p, _mm512_castsi512_si256(halves));
              store(p + out.stride, _mm512_extracti64x4_epi64(halves, 1));
            }
          }
        }
#pragma GCC unroll 3
        for (int part = 0; part < kNumParts; ++part) {
          transpose(pairs[part]);
          BFloat16* p = columns.data + part * columns.part_stride + c * columns.stride + row;
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) store(p + i * columns.stride, pairs[part][i]);
        }
      }
    }
    return all_finite(probe);
  }
  // bf16 as it is, in squares of 32. Interleaving two rows leaves columns 0-3, 8-11, 16-19, 24-27
  // in the lower result and the others in the upper one.
  static bool copy_rows_and_columns(const BFloat16* const* rows, int64_t num_rows, int64_t d,
                                    Matrix out, Matrix columns) {
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t c = 0; c < width(d); c += 32) {
      const __mmask32 valid = d - c >= 32 ? ~0u : (1u << (d - c)) - 1;
      for (int64_t row = 0; row < num_rows; row += 32) {
        VecI low[16], high[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          __m512i x[2];
          for (int j = 0; j < 2; ++j) {
            const int64_t r = row + 2 * i + j;
            const bool present = r < num_rows && rows[r] != nullptr;
            x[j] = present ? _mm512_maskz_loadu_epi16(valid, rows[r] + c) : _mm512_setzero_si512();
            largest = _mm512_max_epu16(largest, _mm512_and_si512(x[j], magnitude));
            if (r < num_rows) store(out.data + r * out.stride + c, x[j]);
          }
          low[i] = (VecI)_mm512_unpacklo_epi16(x[0], x[1]);
          high[i] = (VecI)_mm512_unpackhi_epi16(x[0], x[1]);
        }
        transpose(low);
        transpose(high);
        BFloat16* p = columns.data + c * columns.stride + row;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int64_t column = i / 4 * 8 + i % 4;
          store(p + column * columns.stride, low[i]);
          store(p + (column + 4) * columns.stride, high[i]);
        }
      }
    }
    return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7F80)) == 0;
  }
  template <typename T>
  static bool pack_wide(const T* const* rows, int64_t num_rows, int64_t d, Matrix out) {
    return pack_b_rows<kNumParts>(rows, num_rows, d, num_rows, width(d), out.data, out.stride,
                                  out.part_stride);
  }
  template <typename T>
  static bool pack_transposed(const T* const* rows, int64_t num_rows, int64_t d, Matrix out) {
    const int64_t height = depth(d);
    bool finite = true;
    for (int64_t row = 0; row < num_rows; row += kTileN) {
      finite &= pack_b_columns<kNumParts>(rows + row, kTileN, d, height, kTileN,
                                          panel_from(out, height, 0, row).data, out.stride,
                                          out.part_stride);
    }
    return finite;
  }

  // The next bf16 part of two vectors, that of x0 in the lower half; the vectors keep the rest.
  static FAP_INLINE __m512i take_part(Vec& x0, Vec& x1) {
    const __m512i part = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    if constexpr (kNumParts > 1) {
      x0 -= (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(part)), 16);
      x1 -= (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(part, 1)), 16);
    }
    return part;
  }
  // The halves' numbers next to each other.
  static FAP_INLINE __m512i interleave(__m512i halves) {
    typedef uint16_t Order __attribute__((vector_size(64)));
    Order order;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      order[2 * i] = i;
      order[2 * i + 1] = 16 + i;
    }
    return _mm512_permutexvar_epi16((__m512i)order, halves);
  }
  static FAP_INLINE void store_panel(Vec x0, Vec x1, Matrix panel, int64_t row, int64_t column) {
    BFloat16* p = panel.data + row * kTileN + 2 * column;
#pragma GCC unroll 3
    for (int part = 0; part < kNumParts; ++part) {
      store(p + part * panel.part_stride, interleave(take_part(x0, x1)));
    }
  }
  static FAP_INLINE void store_panel_and_rows(Vec x0, Vec x1, Matrix panel, Matrix rows,
                                              int64_t row, int64_t column) {
    BFloat16* p = panel.data + row * kTileN + 2 * column;
    BFloat16* r = rows.data + row * rows.stride + column;
#pragma GCC unroll 3
    for (int part = 0; part < kNumParts; ++part) {
      const __m512i halves = take_part(x0, x1);
      store(p + part * panel.part_stride, interleave(halves));
      store(r + part * rows.part_stride, _mm512_castsi512_si256(halves));
      store(r + part * rows.part_stride + rows.stride, _mm512_extracti64x4_epi64(halves, 1));
    }
  }
};

#endif

}  // namespace flash_attn_plus::cpu::FAP_ISA
