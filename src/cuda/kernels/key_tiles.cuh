// The keys, or values, of one sequence and head, tile by tile from the last to the first: rows side
// by side, or in pages.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/tile.cuh"

namespace flash_attn_plus::cuda {

template <bool kPaged, Access kAccess, int kThreads, typename T>
struct KeyTiles;

template <Access kAccess, int kThreads, typename T>
struct KeyTiles<false, kAccess, kThreads, T> {
  const Operand& x;
  const uint16_t* source;  // of this thread, in the tile that is next

  // The first tile is that from `row` of the sequence on.
  FAP_DEVICE KeyTiles(const ForwardParams& params, const Operand& x, const Sequence& sequence,
                      int64_t batch, int64_t head, int thread, int row)
      : x(x),
        source(thread_source<T, kThreads>(static_cast<const uint16_t*>(x.data) +
                                              key_row_offset(params, x, batch, sequence.k_begin) +
                                              row * x.row_stride + head * x.head_stride,
                                          x.row_stride, thread)) {}

  template <typename NumValid>
  FAP_DEVICE void copy_next(T tile, int thread, int head_dim, NumValid num_valid) {
    copy_thread_rows<kAccess, kThreads>(tile, thread, head_dim, source, x.row_stride, num_valid);
    source -= T::kRows * x.row_stride;
  }
};

template <Access kAccess, int kThreads, typename T>
struct KeyTiles<true, kAccess, kThreads, T> {
  const ForwardParams& params;
  const Operand& x;
  const uint16_t* first;
  const int32_t* pages;
  int position;  // of the first row of the tile that is next

  FAP_DEVICE KeyTiles(const ForwardParams& params, const Operand& x, const Sequence& sequence,
                      int64_t batch, int64_t head, int thread, int row)
      : params(params),
        x(x),
        first(static_cast<const uint16_t*>(x.data) + head * x.head_stride),
        pages(params.block_table + batch * params.block_table_stride),
        position(static_cast<int>(sequence.k_begin) + row) {}

  FAP_DEVICE const uint16_t* row_pointer(int row) const {
    const uint32_t page_size = static_cast<uint32_t>(params.page_size);
    const uint32_t slot = static_cast<uint32_t>(row) / page_size;
    const int64_t page = clamped(pages[slot], params.num_pages - 1);
    return first + page * x.batch_stride + (row - slot * page_size) * x.row_stride;
  }

  template <typename NumValid>
  FAP_DEVICE void copy_next(T tile, int thread, int head_dim, NumValid num_valid) {
    gather_rows<kAccess, kThreads>(
        tile, thread, head_dim,
        // Rows beyond the last have no page.
        [&](int r) {
          if constexpr (requires { num_valid - 1; }) r = min(r, num_valid - 1);
          return row_pointer(position + r);
        },
        num_valid);
    position -= T::kRows;
  }
};

}  // namespace flash_attn_plus::cuda
