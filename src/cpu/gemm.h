// Products of small matrices of float: C = A B or C += A B, operands in cache, rows apart by a
// leading dimension.
//
// A micro-kernel keeps kMicroRows x kMicroVectors vectors of C in registers; for every k it loads a
// row of B and broadcasts a column of A: with AVX-512 10 loads for 24 multiply-adds, so that the
// multiply-add units are the bound. The sum over k runs upwards for every element of C, whatever
// its place: a result does not depend on how a matrix is cut.
#pragma once

#include "cpu/simd.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Accumulators, a row of B and a broadcast fit into 32 registers, or 16.
inline constexpr int kMicroRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kMicroVectors = 4;
#else
inline constexpr int kMicroVectors = 2;
#endif

// Columns of C that one micro-kernel makes: the width of a panel.
inline constexpr int kPanel = kMicroVectors * kLanes;

// A is (kRows, k): a[row * lda + k], or transposed: a[k * lda + row].
template <int kRows, int kVectors, bool kTransposedA>
FAP_INLINE void gemm_micro(int k, const float* a, int64_t lda, const float* b, int64_t ldb,
                           float* c, int64_t ldc, bool accumulate) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sum[row][j] = accumulate ? load(c + row * ldc + j * kLanes) : Vec{};
    }
  }
  for (int i = 0; i < k; ++i) {
    Vec b_row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) b_row[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vec a_element = splat(kTransposedA ? a[row] : a[row * lda]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[row][j] = fma(a_element, b_row[j], sum[row][j]);
    }
    a += kTransposedA ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + row * ldc + j * kLanes, sum[row][j]);
  }
}

// One panel: all rows, in parts as equal as possible.
template <int kVectors, bool kTransposedA>
inline void gemm_panel(int m, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc, bool accumulate) {
  static_assert(kMicroRows == 6);
  const int64_t a_row = kTransposedA ? 1 : lda;
  for (int parts = (m + kMicroRows - 1) / kMicroRows; parts > 0; --parts) {
    const int rows = (m + parts - 1) / parts;
    switch (rows) {
      case 6:
        gemm_micro<6, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
      case 5:
        gemm_micro<5, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
      case 4:
        gemm_micro<4, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
      case 3:
        gemm_micro<3, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
      case 2:
        gemm_micro<2, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
      default:
        gemm_micro<1, kVectors, kTransposedA>(k, a, lda, b, ldb, c, ldc, accumulate);
        break;
    }
    a += rows * a_row;
    c += rows * ldc;
    m -= rows;
  }
}

// C (m, n) with leading dimension ldc; A (m, k), or transposed: stored as (k, m); B (k, n). n is a
// multiple of kLanes; kPanel columns at a time.
template <bool kTransposedA>
inline void gemm(int m, int n, int k, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool accumulate) {
  for (; n >= kPanel; n -= kPanel, b += kPanel, c += kPanel) {
    gemm_panel<kMicroVectors, kTransposedA>(m, k, a, lda, b, ldb, c, ldc, accumulate);
  }
  switch (n / kLanes) {
    case 3:
      gemm_panel<3, kTransposedA>(m, k, a, lda, b, ldb, c, ldc, accumulate);
      break;
    case 2:
      gemm_panel<2, kTransposedA>(m, k, a, lda, b, ldb, c, ldc, accumulate);
      break;
    case 1:
      gemm_panel<1, kTransposedA>(m, k, a, lda, b, ldb, c, ldc, accumulate);
      break;
    default:
      break;
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
