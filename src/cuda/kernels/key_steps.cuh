// The keys and values of one sequence and head, step by step from the first to the last, for a
// group of warps with keys of its own: rows side by side, or in pages.
#pragma once

#include "attention/sequence.h"
#include "cuda/kernels/tile.cuh"

namespace flash_attn_plus::cuda {

// Both copy one step of T::kRows keys to a pair of tiles, keys from `num_valid` on as zeros, and go
// on to the step that begins kStride keys later. kThreads threads take part. `look_up` finds where
// the step that is next lies: it comes before the first copy and after each.
template <bool kPaged, Access kAccess, int kThreads, int kStride, typename T>
struct KeySteps;

template <Access kAccess, int kThreads, int kStride, typename T>
struct KeySteps<false, kAccess, kThreads, kStride, T> {
  const Operand& k;
  const Operand& v;
  const uint16_t* k_source;  // of this thread, in the step that is next
  const uint16_t* v_source;

  FAP_DEVICE KeySteps(const ForwardParams& params, const Sequence& sequence, int64_t batch,
                      int64_t head, int thread, int first_key, int)
      : k(params.k),
        v(params.v),
        k_source(source_of(params, params.k, sequence, batch, head, thread, first_key)),
        v_source(source_of(params, params.v, sequence, batch, head, thread, first_key)) {}

  FAP_DEVICE void look_up(uint32_t) const {}

  FAP_DEVICE static const uint16_t* source_of(const ForwardParams& params, const Operand& x,
                                              const Sequence& sequence, int64_t batch, int64_t head,
                                              int thread, int first_key) {
    return thread_source<T, kThreads>(static_cast<const uint16_t*>(x.data) +
                                          key_row_offset(params, x, batch, sequence.k_begin) +
                                          first_key * x.row_stride + head * x.head_stride,
                                      x.row_stride, thread);
  }

  FAP_DEVICE void copy_next(T k_tile, T v_tile, int thread, int head_dim, int num_valid) {
    copy_thread_rows<kAccess, kThreads>(k_tile, thread, head_dim, k_source, k.row_stride,
                                        num_valid);
    copy_thread_rows<kAccess, kThreads>(v_tile, thread, head_dim, v_source, v.row_stride,
                                        num_valid);
    k_source += kStride * k.row_stride;
    v_source += kStride * v.row_stride;
  }
};

// A lane looks up one key of a step, a step ahead, so that no copy waits for the table; the others
// get it by a shuffle. Under load memory takes longer than that, and every eighth page is in a new
// sector of the table: four steps ahead one lane of eight, as a sector has eight numbers, copies a
// number that nobody reads, to have its sector in the L1 cache when it is looked up. (`prefetch`
// was measured to do nothing.)
template <Access kAccess, int kThreads, int kStride, typename T>
struct KeySteps<true, kAccess, kThreads, kStride, T> {
  static_assert(T::kRows <= 32);
  const ForwardParams& params;
  const uint16_t* k_first;
  const uint16_t* v_first;
  const int32_t* pages;
  uint32_t position;  // of this lane's key, in the step that is next
  uint32_t end;       // of the keys that there are
  uint32_t ahead;     // pages of four steps
  uint32_t last;      // page that there is
  int page = 0;       // where the key lies
  int slot = 0;

  FAP_DEVICE KeySteps(const ForwardParams& params, const Sequence& sequence, int64_t batch,
                      int64_t head, int thread, int first_key, int end_key)
      : params(params),
        k_first(static_cast<const uint16_t*>(params.k.data) + head * params.k.head_stride),
        v_first(static_cast<const uint16_t*>(params.v.data) + head * params.v.head_stride),
        pages(params.block_table + batch * params.block_table_stride),
        position(static_cast<uint32_t>(sequence.k_begin) +
                 static_cast<uint32_t>(first_key + lane_id() % T::kRows)),
        end(static_cast<uint32_t>(sequence.k_begin) + static_cast<uint32_t>(end_key)),
        ahead(4 * kStride / static_cast<uint32_t>(params.page_size)),
        last((max(end, 1u) - 1) / static_cast<uint32_t>(params.page_size)) {}

  // `unread`: 4 bytes in shared memory, of eight lanes, to which no copy is under way.
  FAP_DEVICE void look_up(uint32_t unread) {
    if (position >= end) return;  // such keys have no page
    const uint32_t page_size = static_cast<uint32_t>(params.page_size);
    const uint32_t index = position / page_size;
    slot = static_cast<int>(position - index * page_size);
    const int32_t* const entry = pages + index;
    page = static_cast<int>(clamped(*entry, params.num_pages - 1));
    if (lane_id() % 8 == 0) copy_async4(unread, entry + min(ahead, last - index));
  }

  FAP_DEVICE void copy(T tile, const uint16_t* first, const Operand& x, int thread, int head_dim,
                       int num_valid) const {
    gather_rows<kAccess, kThreads>(
        tile, thread, head_dim,
        [&](int row) {
          const int row_page = __shfl_sync(0xFFFFFFFFu, page, row);
          const int row_slot = __shfl_sync(0xFFFFFFFFu, slot, row);
          return first + row_page * x.batch_stride + row_slot * x.row_stride;
        },
        num_valid);
  }

  FAP_DEVICE void copy_next(T k_tile, T v_tile, int thread, int head_dim, int num_valid) {
    copy(k_tile, k_first, params.k, thread, head_dim, num_valid);
    copy(v_tile, v_first, params.v, thread, head_dim, num_valid);
    position += kStride;
  }
};

}  // namespace flash_attn_plus::cuda
