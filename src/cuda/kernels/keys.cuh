// Where the rows of keys and values of one sequence and head lie: side by side, or in pages.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/tile.cuh"

namespace flash_attn_plus::cuda {

template <bool kPaged>
struct KeyRows;

template <>
struct KeyRows<false> {
  const uint16_t* first;
  int64_t row_stride;

  FAP_DEVICE KeyRows(const ForwardParams& params, const Operand& x, const Sequence& sequence,
                     int64_t batch, int64_t head)
      : first(static_cast<const uint16_t*>(x.data) +
              key_row_offset(params, x, batch, sequence.k_begin) + head * x.head_stride),
        row_stride(x.row_stride) {}

  // Rows row .. row + kRows - 1 of the sequence, those from seqlen_k on as zeros.
  template <Access kAccess, int kThreads, typename T>
  FAP_DEVICE void copy(T tile, int thread, int head_dim, int row, int seqlen_k) const {
    copy_rows<kAccess, kThreads>(tile, thread, head_dim, first + row * row_stride, row_stride,
                                 seqlen_k - row);
  }
};

template <>
struct KeyRows<true> {
  const uint16_t* first;
  const int32_t* pages;
  int64_t page_stride;
  int64_t row_stride;
  uint32_t begin;
  uint32_t page_size;
  int32_t last_page;

  FAP_DEVICE KeyRows(const ForwardParams& params, const Operand& x, const Sequence& sequence,
                     int64_t batch, int64_t head)
      : first(static_cast<const uint16_t*>(x.data) + head * x.head_stride),
        pages(params.block_table + batch * params.block_table_stride),
        page_stride(x.batch_stride),
        row_stride(x.row_stride),
        begin(static_cast<uint32_t>(sequence.k_begin)),
        page_size(static_cast<uint32_t>(params.page_size)),
        last_page(static_cast<int32_t>(params.num_pages - 1)) {}

  FAP_DEVICE const uint16_t* row_pointer(int row) const {
    const uint32_t position = begin + static_cast<uint32_t>(row);
    const uint32_t slot = position / page_size;
    const int32_t page = min(max(pages[slot], 0), last_page);
    return first + page * page_stride + (position - slot * page_size) * row_stride;
  }

  template <Access kAccess, int kThreads, typename T>
  FAP_DEVICE void copy(T tile, int thread, int head_dim, int row, int seqlen_k) const {
    gather_rows<kAccess, kThreads>(
        tile, thread, head_dim,
        [&](int r) { return row_pointer(min(row + r, seqlen_k - 1)); },  // others have no page
        seqlen_k - row);
  }
};

}  // namespace flash_attn_plus::cuda
