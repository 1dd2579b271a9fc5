// A tile of 16-bit numbers in shared memory, filled from rows in global memory.
//
// A row is padded to an odd number of 16-byte chunks, so that the eight rows of an 8x8 matrix lie
// in different banks whatever the row's length: no conflicts, and every fragment's address is a
// base plus a constant, where a swizzle would compute one for each.
#pragma once

#include "cuda/kernels/ptx.cuh"
#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunks = kCols / 8;  // of 16 bytes in a row
  static constexpr int kRowBytes = padded_row_bytes(kCols);
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kCols % 8 == 0);

  uint32_t base;  // address in shared memory

  FAP_DEVICE uint32_t at(int row, int col) const {
    return base + static_cast<uint32_t>(row * kRowBytes + col * 2);
  }
};

// How threads share the chunks of a tile's rows: kSide of them side by side on a row, as many as
// divide it evenly.
template <typename T, int kThreads>
struct RowSharing {
  static constexpr int kSide = T::kChunks % 16 == 0  ? 16
                               : T::kChunks % 8 == 0 ? 8
                               : T::kChunks % 4 == 0 ? 4
                                                     : 2;
  static constexpr int kRowsAtOnce = kThreads / kSide;
  static_assert(T::kChunks % kSide == 0 && kThreads % kSide == 0);
};

// One thread's part of a row, its chunks from `first_chunk` on; `source` is the row's first number.
// What is not valid, and the columns from head_dim on, become zeros and are not read.
template <Access kAccess, int kSide, typename T>
FAP_DEVICE void copy_row(T tile, int row, int first_chunk, int head_dim, const uint16_t* source,
                         bool valid) {
#pragma unroll
  for (int c = 0; c < T::kChunks; c += kSide) {
    const int col = (c + first_chunk) * 8;
    const uint32_t destination = tile.at(row, col);
    if constexpr (kAccess == Access::kWhole) {
      copy_async16(destination, source + col, valid);
    } else if constexpr (kAccess == Access::kPadded) {
      copy_async16(destination, source + col, valid && col < head_dim);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool there = valid && col + i < head_dim;
        store_shared(destination + 2 * i, there ? source[col + i] : static_cast<uint16_t>(0));
      }
    }
  }
}

// Copies a tile from rows that lie side by side, the first at `source`; those from `num_valid` on
// become zeros. With 16-byte access the copies are asynchronous: commit and wait. kThreads threads
// take part.
template <Access kAccess, int kThreads, typename T>
FAP_DEVICE void copy_rows(T tile, int thread, int head_dim, const uint16_t* source,
                          int64_t row_stride, int num_valid) {
  using Sharing = RowSharing<T, kThreads>;
  const int first_row = thread / Sharing::kSide, first_chunk = thread % Sharing::kSide;
  source += first_row * row_stride;
#pragma unroll
  for (int r = 0; r < T::kRows; r += Sharing::kRowsAtOnce) {
    const int row = r + first_row;
    if (T::kRows % Sharing::kRowsAtOnce != 0 && row >= T::kRows) break;
    copy_row<kAccess, Sharing::kSide>(tile, row, first_chunk, head_dim, source, row < num_valid);
    // One pointer that moves on: left alone, the compiler keeps one for each row in registers.
    source += Sharing::kRowsAtOnce * row_stride;
    asm volatile("" : "+l"(source));
  }
}

// The same from rows that lie anywhere: row r at `row_pointer(r)`.
template <Access kAccess, int kThreads, typename T, typename RowPointer>
FAP_DEVICE void gather_rows(T tile, int thread, int head_dim, RowPointer row_pointer,
                            int num_valid) {
  using Sharing = RowSharing<T, kThreads>;
  const int first_row = thread / Sharing::kSide, first_chunk = thread % Sharing::kSide;
#pragma unroll
  for (int r = 0; r < T::kRows; r += Sharing::kRowsAtOnce) {
    const int row = r + first_row;
    if (T::kRows % Sharing::kRowsAtOnce != 0 && row >= T::kRows) break;
    copy_row<kAccess, Sharing::kSide>(tile, row, first_chunk, head_dim, row_pointer(row),
                                      row < num_valid);
  }
}

// The 16x16 numbers from (row, col) of a tile as four 8x8 matrices. One mapping of lanes to
// addresses serves every operand: above, below, and the same to the right.
template <typename T>
FAP_DEVICE uint32_t matrices_at(T tile, int row, int col) {
  const int lane = lane_id();
  return tile.at(row, col) + static_cast<uint32_t>(lane % 16 * T::kRowBytes + lane / 16 * 16);
}

// Operand a of mma(): rows row .. row + 15, columns col .. col + 15 of a row-major tile.
template <typename T>
FAP_DEVICE void load_a(uint32_t (&a)[4], T tile, int row, int col) {
  load_matrices(a, matrices_at(tile, row, col));
}

// Operands b of two mma() whose columns are the tile's rows row .. row + 7 and row + 8 .. row + 15,
// and whose depth is its columns col .. col + 15: {b0, b1} of the first, {b2, b3} of the second.
template <typename T>
FAP_DEVICE void load_b_rows(uint32_t (&b)[4], T tile, int row, int col) {
  uint32_t x[4];
  load_matrices(x, matrices_at(tile, row, col));
  b[0] = x[0];
  b[1] = x[2];
  b[2] = x[1];
  b[3] = x[3];
}

// The same for the transpose: columns are the tile's columns col .. col + 15, the depth is its rows
// row .. row + 15.
template <typename T>
FAP_DEVICE void load_b_cols(uint32_t (&b)[4], T tile, int row, int col) {
  load_matrices_transposed(b, matrices_at(tile, row, col));
}

}  // namespace flash_attn_plus::cuda
