// Tiles of 16-bit numbers in shared memory, filled from rows in global memory.
#pragma once

#include "cuda/kernels/ptx.cuh"
#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

// A tile whose rows are padded to an odd number of 32-byte sectors, and whose rows 4 to 7 of every
// 8 have the two 16-byte halves of each sector exchanged: so the eight rows of an 8x8 matrix lie in
// different banks, whatever the length of a row, and one address and constant offsets reach all
// fragments of a tile, where the usual exclusive or over 128 bytes needs four. A sector stays
// whole: rows padded by 16 bytes would do for the banks, but copies into them fetch the sectors
// that they split twice (13.2 GB through L2 measured where 8.0 do).
template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunks = kCols / 8;  // of 16 bytes in a row
  static constexpr int kRowBytes = padded_row_bytes(kCols);
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kCols % 16 == 0);

  uint32_t base;  // address in shared memory, a multiple of 32

  // Rows 8 r and columns 16 c away lie r * 8 * kRowBytes + c * 32 bytes further.
  FAP_DEVICE uint32_t at(int row, int col) const {
    const int chunk = col / 8 ^ (row / 4 & 1);
    return base + static_cast<uint32_t>(row * kRowBytes + chunk * 16 + col % 8 * 2);
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

// One thread's part of a row, its chunks from `first_chunk` on, the first at `source`.
// What is not valid, and the columns from head_dim on, become zeros and are not read.
template <Access kAccess, int kSide, typename T>
FAP_DEVICE void copy_row(T tile, int row, int first_chunk, int head_dim, const uint16_t* source,
                         bool valid) {
#pragma unroll
  for (int c = 0; c < T::kChunks; c += kSide) {
    const int col = (c + first_chunk) * 8;
    const uint32_t destination = tile.at(row, col);
    if constexpr (kAccess == Access::kWhole) {
      copy_async16(destination, source + c * 8, valid);
    } else if constexpr (kAccess == Access::kPadded) {
      copy_async16(destination, source + c * 8, valid && col < head_dim);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool there = valid && col + i < head_dim;
        store_shared(destination + 2 * i, there ? source[c * 8 + i] : static_cast<uint16_t>(0));
      }
    }
  }
}

// Numbers one at a time would take all registers if many rows of them were under way.
template <Access kAccess, typename T>
constexpr int rows_unrolled() {
  return kAccess == Access::kElement ? 1 : T::kRows;
}

// Instead of a number of valid rows: all are there, and nothing is compared.
struct AllRows {};
FAP_DEVICE constexpr bool is_valid(int row, int num_valid) { return row < num_valid; }
FAP_DEVICE constexpr bool is_valid(int, AllRows) { return true; }

// The number that a thread copies first of a tile whose rows lie side by side, the first at
// `source`.
template <typename T, int kThreads>
FAP_DEVICE const uint16_t* thread_source(const uint16_t* source, int64_t row_stride, int thread) {
  using Sharing = RowSharing<T, kThreads>;
  return source + thread / Sharing::kSide * row_stride + thread % Sharing::kSide * 8;
}

// Copies a tile whose rows lie side by side, from thread_source(); rows from `num_valid` on and
// those before `first_valid` become zeros. With 16-byte access the copies are asynchronous: commit
// and wait. kThreads threads take part.
template <Access kAccess, int kThreads, typename T, typename NumValid>
FAP_DEVICE void copy_thread_rows(T tile, int thread, int head_dim, const uint16_t* source,
                                 int64_t row_stride, NumValid num_valid, int first_valid = 0) {
  using Sharing = RowSharing<T, kThreads>;
  const int first_row = thread / Sharing::kSide, first_chunk = thread % Sharing::kSide;
#pragma unroll(rows_unrolled<kAccess, T>())
  for (int r = 0; r < T::kRows; r += Sharing::kRowsAtOnce) {
    const int row = r + first_row;
    if (T::kRows % Sharing::kRowsAtOnce != 0 && row >= T::kRows) break;
    copy_row<kAccess, Sharing::kSide>(tile, row, first_chunk, head_dim, source,
                                      row >= first_valid && is_valid(row, num_valid));
    // One pointer that moves on: left alone, the compiler keeps one for each row in registers.
    source += Sharing::kRowsAtOnce * row_stride;
    asm volatile("" : "+l"(source));
  }
}

// The same, `source` being the tile's first row.
template <Access kAccess, int kThreads, typename T, typename NumValid>
FAP_DEVICE void copy_rows(T tile, int thread, int head_dim, const uint16_t* source,
                          int64_t row_stride, NumValid num_valid) {
  copy_thread_rows<kAccess, kThreads>(tile, thread, head_dim,
                                      thread_source<T, kThreads>(source, row_stride, thread),
                                      row_stride, num_valid);
}

// The same from rows that lie anywhere: row r at `row_pointer(r)`.
template <Access kAccess, int kThreads, typename T, typename RowPointer, typename NumValid>
FAP_DEVICE void gather_rows(T tile, int thread, int head_dim, RowPointer row_pointer,
                            NumValid num_valid) {
  using Sharing = RowSharing<T, kThreads>;
  const int first_row = thread / Sharing::kSide, first_chunk = thread % Sharing::kSide;
#pragma unroll(rows_unrolled<kAccess, T>())
  for (int r = 0; r < T::kRows; r += Sharing::kRowsAtOnce) {
    const int row = r + first_row;
    if (T::kRows % Sharing::kRowsAtOnce != 0 && row >= T::kRows) break;
    copy_row<kAccess, Sharing::kSide>(tile, row, first_chunk, head_dim,
                                      row_pointer(row) + first_chunk * 8, is_valid(row, num_valid));
  }
}

// Operand a of mma(): rows row .. row + 15, columns col .. col + 15 of a row-major tile.
template <typename T>
FAP_DEVICE void load_a(uint32_t (&a)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices(a, tile.at(lane % 16, lane / 16 * 8) + row * T::kRowBytes + col * 2);
}

// Operands b of two mma() whose columns are the tile's rows row .. row + 7 and row + 8 .. row + 15,
// and whose depth is its columns col .. col + 15: {b0, b1} of the first, {b2, b3} of the second.
// The two of an operand have to lie side by side in registers, so lanes are mapped as they arrive.
template <typename T>
FAP_DEVICE void load_b_rows(uint32_t (&b)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices(b,
                tile.at(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8) + row * T::kRowBytes + col * 2);
}

// The same for the transpose: columns are the tile's columns col .. col + 15, the depth is its rows
// row .. row + 15.
template <typename T>
FAP_DEVICE void load_b_cols(uint32_t (&b)[4], T tile, int row, int col) {
  const int lane = lane_id();
  load_matrices_transposed(b, tile.at(lane % 16, lane / 16 * 8) + row * T::kRowBytes + col * 2);
}

}  // namespace flash_attn_plus::cuda
