// A tile of 16-bit numbers in shared memory, filled from rows in global memory.
//
// A row is padded to an odd number of 16-byte chunks, so that the eight rows of an 8x8 matrix lie in
// different banks whatever the row's length: no conflicts, and every fragment's address is a base
// plus a constant, where a swizzle would compute one for each.
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

// Copies rows [0, kRows) of a tile: row r from `row_pointer(r)`, a const uint16_t*. Rows for which
// `row_valid(r)` is false, and columns from head_dim on, become zeros and are not read. With
// 16-byte access the copies are asynchronous: commit and wait. kThreads threads take part.
template <Access kAccess, int kThreads, typename T, typename RowPointer, typename RowValid>
FAP_DEVICE void copy_rows(T tile, int thread, int head_dim, RowPointer row_pointer,
                          RowValid row_valid) {
  // As many threads side by side on a row as divide its chunks evenly.
  constexpr int kSide = T::kChunks % 16 == 0  ? 16
                        : T::kChunks % 8 == 0 ? 8
                        : T::kChunks % 4 == 0 ? 4
                                              : 2;
  constexpr int kRowsAtOnce = kThreads / kSide;
  static_assert(T::kChunks % kSide == 0 && kThreads % kSide == 0);
  const int first_chunk = thread % kSide;
#pragma unroll
  for (int r = 0; r < T::kRows; r += kRowsAtOnce) {
    const int row = r + thread / kSide;
    if (T::kRows % kRowsAtOnce != 0 && row >= T::kRows) break;
    const bool valid = row_valid(row);
    const uint16_t* source = row_pointer(row);
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
          store_shared(destination + 2 * i,
                       there ? source[col + i] : static_cast<uint16_t>(0));
        }
      }
    }
  }
}

// Operand a of mma(): rows row .. row + 15, columns col .. col + 15 of a row-major tile.
template <typename T>
FAP_DEVICE void load_a(uint32_t (&a)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices(a, tile.at(row + lane % 16, col + lane / 16 * 8));
}

// Operands b of two mma() whose columns are the tile's rows row .. row + 7 and row + 8 .. row + 15,
// and whose depth is its columns col .. col + 15: {b0, b1} of the first, {b2, b3} of the second.
template <typename T>
FAP_DEVICE void load_b_rows(uint32_t (&b)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices(b, tile.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
}

// The same for the transpose: columns are the tile's columns col .. col + 15, the depth is its rows
// row .. row + 15.
template <typename T>
FAP_DEVICE void load_b_cols(uint32_t (&b)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices_transposed(b, tile.at(row + lane % 16, col + lane / 16 * 8));
}

}  // namespace flash_attn_plus::cuda
