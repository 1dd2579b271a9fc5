// Products of small matrices of bf16 with float accumulation, on AMX tiles or with dot-product
// instructions, and through them products of wider numbers.
//
// A number is the sum of kParts bf16 numbers: bf16 is one, fp16 is exactly two (11 bits in 8 + 3),
// a float is three (24 = 8 + 8 + 8). The product of two such numbers is the sum of the products of
// their parts; those of order 2^-8kParts and below are left out: 1, 3 and 6 products remain. AMX
// runs 16 times as many multiply-adds as the float units, so all three pay there; dot products only
// run twice as many and serve bf16 alone.
//
// A is row-major. B holds pairs of its rows, (b[2i][j], b[2i + 1][j]) next to each other, as both
// instructions want it ("VNNI"). The parts of a matrix follow one another.
#pragma once

#include "cpu/convert.h"

namespace flash_attn_plus::cpu::FAP_ISA {

#if defined(__AMX_BF16__)
inline constexpr bool kHasBFloat16Gemm = true;
inline constexpr int kGemmRows = 16;     // m is a multiple of this,
inline constexpr int kGemmDepth = 32;    // k of this,
inline constexpr int kGemmColumns = 16;  // and n of this
#elif defined(__AVX512BF16__)
inline constexpr bool kHasBFloat16Gemm = true;
inline constexpr int kGemmRows = 1;
inline constexpr int kGemmDepth = 2;
inline constexpr int kGemmColumns = 16;
#else
inline constexpr bool kHasBFloat16Gemm = false;
inline constexpr int kGemmRows = 1;
inline constexpr int kGemmDepth = 1;
inline constexpr int kGemmColumns = kLanes;
#endif

// Parts that a number of type T is multiplied in; 0: as float.
template <typename T>
inline constexpr int kParts = 0;
#if defined(__AMX_BF16__)
template <>
inline constexpr int kParts<BFloat16> = 1;
template <>
inline constexpr int kParts<Half> = 2;
template <>
inline constexpr int kParts<float> = 3;
#elif defined(__AVX512BF16__)
template <>
inline constexpr int kParts<BFloat16> = 1;
#endif

// A matrix of bf16 in parts. `stride`: elements between rows (of A) or pairs of rows (of B);
// `part_stride`: between parts.
struct BFloat16Matrix {
  const BFloat16* data;
  int64_t stride;
  int64_t part_stride;
};

#if defined(__AMX_BF16__)

// All eight tiles are 16 rows of 64 bytes. Tile state is the thread's: a task loads the
// configuration when it begins and releases it at its end, lest every switch of threads saves 8 KB.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const configuration;
    // Not _tile_loadconfig: GCC 12 believes that it reads one byte.
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

// kM x kN tiles of C, 1 or 2 each, in tiles 0 to 3; A passes through 4 and 5, B through 6 and 7.
template <int kNumParts, int kM, int kN>
FAP_INLINE void gemm_tiles(int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                           bool accumulate) {
  const int64_t a_bytes = 2 * a.stride, b_bytes = 2 * b.stride, c_bytes = 4 * ldc;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kN == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kM == 2) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if constexpr (kM == 2 && kN == 2) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN == 2) _tile_zero(1);
    if constexpr (kM == 2) _tile_zero(2);
    if constexpr (kM == 2 && kN == 2) _tile_zero(3);
  }
  // The smallest products first, while the sum is small: their roundings then hardly count.
#pragma GCC unroll 3
  for (int order = kNumParts - 1; order >= 0; --order) {
#pragma GCC unroll 3
    for (int a_part = 0; a_part <= order; ++a_part) {
      const BFloat16* a_data = a.data + a_part * a.part_stride;
      const BFloat16* b_data = b.data + (order - a_part) * b.part_stride;
      for (int i = 0; i < k; i += 32) {
        _tile_loadd(4, a_data, a_bytes);
        _tile_loadd(6, b_data, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kN == 2) {
          _tile_loadd(7, b_data + 32, b_bytes);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kM == 2) {
          _tile_loadd(5, a_data + 16 * a.stride, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (kN == 2) _tile_dpbf16ps(3, 5, 7);
        }
        a_data += 32;
        b_data += 16 * b.stride;
      }
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kN == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kM == 2) _tile_stored(2, c + 16 * ldc, c_bytes);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

// As gemm_tiles; a float's product is summed apart from C, which is added once at the end: six
// products that were each added to C would round to its magnitude three times as often as
// multiply-adds do.
template <int kNumParts, int kM, int kN>
FAP_INLINE void gemm_block(int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                           bool accumulate) {
  if (kNumParts < 3 || !accumulate) {
    gemm_tiles<kNumParts, kM, kN>(k, a, b, c, ldc, accumulate);
    return;
  }
  alignas(64) float sum[16 * kM][16 * kN];
  gemm_tiles<kNumParts, kM, kN>(k, a, b, sum[0], 16 * kN, false);
  for (int row = 0; row < 16 * kM; ++row) {
    for (int j = 0; j < 16 * kN; j += 16) {
      float* p = c + row * ldc + j;
      store(p, load(p) + load(&sum[row][j]));
    }
  }
}

// C (m, n) = or += A (m, k) B (k, n), with tiles configured (AmxTiles).
template <int kNumParts>
inline void gemm(int m, int n, int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                 bool accumulate) {
  for (int i = 0; i < m; i += 32, a.data += 32 * a.stride) {
    BFloat16Matrix b_columns = b;
    float* c_block = c + i * ldc;
    const bool two_rows = i + 16 < m;
    for (int j = 0; j < n; j += 32, b_columns.data += 64, c_block += 32) {
      const bool two_columns = j + 16 < n;
      if (two_rows && two_columns) {
        gemm_block<kNumParts, 2, 2>(k, a, b_columns, c_block, ldc, accumulate);
      } else if (two_rows) {
        gemm_block<kNumParts, 2, 1>(k, a, b_columns, c_block, ldc, accumulate);
      } else if (two_columns) {
        gemm_block<kNumParts, 1, 2>(k, a, b_columns, c_block, ldc, accumulate);
      } else {
        gemm_block<kNumParts, 1, 1>(k, a, b_columns, c_block, ldc, accumulate);
      }
    }
  }
}

// A product C = or += A B of 32 columns in small steps, for a caller that has vectors to work on
// meanwhile. A step either multiplies, with 8 instructions that keep the tile unit busy for 64
// cycles, or stores one tile: stores in a row would wait for the products before them and fill the
// store buffer, and then the vectors wait as well. C's tiles stay in their registers between the
// steps of a block of 32 rows, so one product must be finished before the next takes a step.
template <int kNumParts>
class SteppedProduct {
 public:
  static constexpr bool kStepped = true;

  void start(int m, int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
             bool accumulate) {
    rows_left_ = m;
    k_ = k;
    a_ = a;
    b_ = b;
    c_ = c;
    ldc_ = ldc;
    accumulate_ = accumulate;
    begin_block();
  }

  int num_steps() const {
    const int num_products = kNumParts * (kNumParts + 1) / 2;
    return (rows_left_ + 31) / 32 * (k_ / 32 * num_products + last_tile());
  }
  bool finished() const { return rows_left_ <= 0; }

  FAP_INLINE void step() {
    if (order_ >= 0) {
      multiply();
    } else {
      put_away(next_tile_++);
      if (next_tile_ == last_tile()) {
        rows_left_ -= 32;
        a_.data += 32 * a_.stride;
        c_ += 32 * ldc_;
        begin_block();
      }
    }
  }

  __attribute__((noinline)) void finish() {
    while (!finished()) step();
  }

 private:
  // See gemm_block.
  bool sums_apart() const { return kNumParts == 3 && accumulate_; }
  int last_tile() const { return sums_apart() ? 8 : 4; }

  void begin_block() {
    order_ = kNumParts - 1;
    a_part_ = i_ = next_tile_ = 0;
  }

  FAP_INLINE void multiply() {
    const bool two = rows_left_ > 16;
    if (order_ == kNumParts - 1 && a_part_ == 0 && i_ == 0) load_tiles(two);
    const BFloat16* a = a_.data + a_part_ * a_.part_stride + i_;
    const BFloat16* b = b_.data + (order_ - a_part_) * b_.part_stride + i_ / 2 * b_.stride;
    _tile_loadd(4, a, 2 * a_.stride);
    _tile_loadd(6, b, 2 * b_.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 32, 2 * b_.stride);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, a + 16 * a_.stride, 2 * a_.stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    i_ += 32;
    if (i_ < k_) return;
    i_ = 0;
    if (++a_part_ <= order_) return;
    a_part_ = 0;
    --order_;
  }

  FAP_INLINE void load_tiles(bool two) {
    if (accumulate_ && !sums_apart()) {
      _tile_loadd(0, c_, 4 * ldc_);
      _tile_loadd(1, c_ + 16, 4 * ldc_);
      if (two) {
        _tile_loadd(2, c_ + 16 * ldc_, 4 * ldc_);
        _tile_loadd(3, c_ + 16 * ldc_ + 16, 4 * ldc_);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }

  // Stores tile `index`, or adds what tile index - 4 was stored as.
  FAP_INLINE void put_away(int index) {
    const int tile = index & 3;
    if (tile >= 2 && rows_left_ <= 16) return;
    const int row = tile / 2 * 16, column = tile % 2 * 16;
    float* c = c_ + row * ldc_ + column;
    if (index < 4) {
      float* to = sums_apart() ? sum_ + 32 * row + column : c;
      const int64_t bytes = 4 * (sums_apart() ? 32 : ldc_);
      switch (index) {
        case 0:
          _tile_stored(0, to, bytes);
          break;
        case 1:
          _tile_stored(1, to, bytes);
          break;
        case 2:
          _tile_stored(2, to, bytes);
          break;
        default:
          _tile_stored(3, to, bytes);
          break;
      }
    } else {
      for (int i = 0; i < 16; ++i) {
        store(c + i * ldc_, load(c + i * ldc_) + load(sum_ + 32 * (row + i) + column));
      }
    }
  }

  int rows_left_ = 0, k_ = 0;
  BFloat16Matrix a_{}, b_{};
  float* c_ = nullptr;
  int64_t ldc_ = 0;
  bool accumulate_ = false;
  int order_ = 0, a_part_ = 0, i_ = 0;  // next: parts a_part and order - a_part, from i on
  int next_tile_ = 0;                   // when order < 0: to be put away
  alignas(64) float sum_[32 * 32];
};

#elif defined(__AVX512BF16__)

// Nothing to configure.
struct AmxTiles {
  AmxTiles() {}
};

template <int kRows, int kVectors>
FAP_INLINE void gemm_dot_micro(int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                               bool accumulate) {
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      sum[row][j] = accumulate ? load(c + row * ldc + j * kLanes) : Vec{};
    }
  }
  const BFloat16* a_pair = a.data;
  const BFloat16* b_pair = b.data;
  for (int i = 0; i < k; i += 2, a_pair += 2, b_pair += b.stride) {
    __m512bh b_row[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) b_row[j] = load<__m512bh>(b_pair + 32 * j);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      std::memcpy(&pair, a_pair + row * a.stride, sizeof(pair));
      const __m512bh a_element = (__m512bh)splat(pair);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[row][j] = _mm512_dpbf16_ps(sum[row][j], a_element, b_row[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + row * ldc + j * kLanes, sum[row][j]);
  }
}

template <int kVectors>
inline void gemm_dot_panel(int m, int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                           bool accumulate) {
  for (int parts = (m + 5) / 6; parts > 0; --parts) {
    const int rows = (m + parts - 1) / parts;
    switch (rows) {
      case 6:
        gemm_dot_micro<6, kVectors>(k, a, b, c, ldc, accumulate);
        break;
      case 5:
        gemm_dot_micro<5, kVectors>(k, a, b, c, ldc, accumulate);
        break;
      case 4:
        gemm_dot_micro<4, kVectors>(k, a, b, c, ldc, accumulate);
        break;
      case 3:
        gemm_dot_micro<3, kVectors>(k, a, b, c, ldc, accumulate);
        break;
      case 2:
        gemm_dot_micro<2, kVectors>(k, a, b, c, ldc, accumulate);
        break;
      default:
        gemm_dot_micro<1, kVectors>(k, a, b, c, ldc, accumulate);
        break;
    }
    a.data += rows * a.stride;
    c += rows * ldc;
    m -= rows;
  }
}

// C (m, n) = or += A (m, k) B (k, n).
template <int kNumParts>
inline void gemm(int m, int n, int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
                 bool accumulate) {
  static_assert(kNumParts == 1);
  for (; n >= 64; n -= 64, b.data += 128, c += 64) {
    gemm_dot_panel<4>(m, k, a, b, c, ldc, accumulate);
  }
  switch (n / 16) {
    case 3:
      gemm_dot_panel<3>(m, k, a, b, c, ldc, accumulate);
      break;
    case 2:
      gemm_dot_panel<2>(m, k, a, b, c, ldc, accumulate);
      break;
    case 1:
      gemm_dot_panel<1>(m, k, a, b, c, ldc, accumulate);
      break;
    default:
      break;
  }
}

// Dot products share the float units with everything else: a product is made when it is started.
template <int kNumParts>
class SteppedProduct {
 public:
  static constexpr bool kStepped = false;
  void start(int m, int k, BFloat16Matrix a, BFloat16Matrix b, float* c, int64_t ldc,
             bool accumulate) {
    gemm<kNumParts>(m, 64, k, a, b, c, ldc, accumulate);
  }
  static int num_steps() { return 0; }
  static bool finished() { return true; }
  static void step() {}
  static void finish() {}
};

#else

struct AmxTiles {
  AmxTiles() {}
};

#endif

}  // namespace flash_attn_plus::cpu::FAP_ISA
