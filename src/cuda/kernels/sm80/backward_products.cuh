// The five products of a backward step on mma(), and how their results leave the registers.
#pragma once

#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/tile.cuh"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

template <int kM, int kN>
FAP_DEVICE void set_zero(Fragments<kM, kN>& x) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][n][i] = 0.0f;
    }
  }
}

// Reads operands of mma() from a tile, for a warp whose part begins at (row, col): `outer` counts
// the rows of an operand a, or the columns of a b, and `depth` what is summed over. kTransposed:
// depth runs along the tile's rows.
//
// One address and constants to be added. It is meant to live for one product: left alone, the
// compiler computes the addresses of all products once for all steps, and spills them. So `lane`
// comes from read_lane().
template <typename T, bool kIsA, bool kTransposed>
struct OperandReader {
  uint32_t address;

  FAP_DEVICE OperandReader(T tile, int row, int col, int lane) {
    // The order of the four 8x8 matrices in registers is rows first for an operand a and depth
    // first for the two of a b.
    address = kIsA == kTransposed ? tile.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8)
                                  : tile.at(row + lane % 16, col + lane / 16 * 8);
  }
  FAP_DEVICE void load(uint32_t (&x)[4], int outer, int depth) const {
    if constexpr (kTransposed) {
      load_matrices_transposed(x, address + depth * T::kRowBytes + outer * 2);
    } else {
      load_matrices(x, address + outer * T::kRowBytes + depth * 2);
    }
  }
};
template <typename T>
using RowsOfA = OperandReader<T, true, false>;
template <typename T>
using ColumnsOfA = OperandReader<T, true, true>;
template <typename T>
using RowsOfB = OperandReader<T, false, false>;
template <typename T>
using ColumnsOfB = OperandReader<T, false, true>;

// lane_id() and threadIdx.x, read again every time. Cut to their range, of which the compiler knows
// nothing, so that dividing them is a shift.
FAP_DEVICE int read_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane & 31;
}
FAP_DEVICE int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 1023;
}

// c += a b over a depth of kDepth.
template <DType kType, int kDepth, int kM, int kN, typename A, typename B>
FAP_DEVICE void multiply_add(Fragments<kM, kN>& c, const A& a, const B& b) {
  static_assert(kDepth % 16 == 0 && kN % 2 == 0);
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t x[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(x[m], 16 * m, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t y[4];
      b.load(y, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<kType>(c[m][n], x[m], y[0], y[1]);
        mma<kType>(c[m][n + 1], x[m], y[2], y[3]);
      }
    }
  }
}

// Rounds accumulators to 16 bits and stores them from (row, col) of a tile on.
template <DType kType, int kM, int kN, typename T>
FAP_DEVICE void store_fragments(const Fragments<kM, kN>& x, T tile, int row, int col, int lane) {
#if __CUDA_ARCH__ >= 900
  const uint32_t address = tile.at(row + lane % 16, col + lane / 16 * 8);
#else
  // The two halves of a sector may be exchanged.
  const uint32_t left = tile.at(row + lane / 4, col + lane % 4 * 2);
  const uint32_t right = tile.at(row + lane / 4, col + 8 + lane % 4 * 2);
#endif
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        packed[i] = pack2<kType>(x[m][n + i / 2][i % 2 * 2], x[m][n + i / 2][i % 2 * 2 + 1]);
      }
#if __CUDA_ARCH__ >= 900
      store_matrices(address + 16 * m * T::kRowBytes + 8 * n * 2, packed);
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared((i < 2 ? left : right) + (16 * m + i % 2 * 8) * T::kRowBytes + 8 * n * 2,
                     packed[i]);
      }
#endif
    }
  }
}

// Adds accumulators to a block of the accumulator of dQ in memory, from row16 and col8 on.
template <bool kVector, int kHeadDim, int kM, int kN>
FAP_DEVICE void add_fragments(const Fragments<kM, kN>& x, float* block, int row16, int col8,
                              int lane) {
  float* target = block + accumulator_index(kVector, kHeadDim, row16, col8, lane, 0);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float* fragment = target + accumulator_index(kVector, kHeadDim, m, n, 0, 0);
#if __CUDA_ARCH__ >= 900
      if constexpr (kVector) add_to_memory4(fragment, x[m][n]);
#endif
#pragma unroll
      for (int i = 0; i < 4 && !kVector; ++i) {
        add_to_memory(fragment + accumulator_index(kVector, kHeadDim, 0, 0, 0, i), x[m][n][i]);
      }
    }
  }
}

// Reads rows [begin, end) of a tile, the tile's row 0 being at `source`. Other rows, and columns
// from head_dim on, become zeros and are not read. Copies of 16 bytes are asynchronous: commit and
// wait.
template <Access kAccess, int kThreads, typename T>
FAP_DEVICE void load_rows(T tile, int thread, int head_dim, const uint16_t* source,
                          int64_t row_stride, int begin, int end) {
  using Sharing = RowSharing<T, kThreads>;
  static_assert(Sharing::kRowsAtOnce % 8 == 0);  // a thread's rows are constants apart in the tile
  const int first_row = thread / Sharing::kSide, first_col = thread % Sharing::kSide * 8;
  const uint32_t destination = tile.at(first_row, first_col);
  const uint32_t row_in_range = static_cast<uint32_t>(first_row - begin);
  const uint32_t range = static_cast<uint32_t>(max(end - begin, 0));
  source += first_row * row_stride + first_col;
#pragma unroll
  for (int r = 0; r < T::kRows; r += Sharing::kRowsAtOnce) {
    if (T::kRows % Sharing::kRowsAtOnce != 0 && r + first_row >= T::kRows) break;
    const bool valid = row_in_range + r < range;
#pragma unroll
    for (int c = 0; c < T::kCols; c += 8 * Sharing::kSide) {
      const uint32_t target = destination + r * T::kRowBytes + c * 2;
      if constexpr (kAccess == Access::kElement) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool there = valid && first_col + c + i < head_dim;
          store_shared(target + 2 * i, there ? source[c + i] : uint16_t{0});
        }
      } else {
        const bool there = valid && (kAccess == Access::kWhole || first_col + c < head_dim);
        copy_async16(target, source + c, there);
      }
    }
    // One pointer that moves on: left alone, the compiler keeps one for each row in registers.
    source += Sharing::kRowsAtOnce * row_stride;
    asm volatile("" : "+l"(source));
  }
}

// Writes rows [0, end) of a tile, by the same threads.
template <Access kAccess, int kThreads, typename T>
FAP_DEVICE void store_rows(T tile, int thread, int head_dim, uint16_t* target, int64_t row_stride,
                           int end) {
  using Sharing = RowSharing<T, kThreads>;
  const int first_col = thread % Sharing::kSide * 8;
  for (int row = thread / Sharing::kSide; row < min(T::kRows, end); row += Sharing::kRowsAtOnce) {
    uint16_t* target_row = target + row * row_stride;
#pragma unroll
    for (int c = first_col; c < T::kCols; c += 8 * Sharing::kSide) {
      const uint4 x = load_shared16(tile.at(row, c));
      if constexpr (kAccess == Access::kElement) {
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (c + i < head_dim) {
            target_row[c + i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
          }
        }
      } else if (kAccess == Access::kWhole || c < head_dim) {
        *reinterpret_cast<uint4*>(target_row + c) = x;
      }
    }
  }
}

}  // namespace flash_attn_plus::cuda
