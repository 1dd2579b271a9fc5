// Where each sequence of a batch lies.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"
#include "attention/shared.h"

namespace flash_attn_plus {

struct Sequence {
  int64_t q_begin = 0;  // first row of q within q.data + batch * q.batch_stride
  int64_t seqlen_q = 0;
  int64_t k_begin = 0;   // first valid row of k, left padding skipped; counted in pages when paged
  int64_t seqlen_k = 0;  // valid keys

  FAP_SHARED Mask mask(const AttentionParams& params) const {
    return {seqlen_q, seqlen_k, params.window_left, params.window_right};
  }
};

// `x`, or the nearest number of [0, most].
FAP_SHARED int64_t clamped(int64_t x, int64_t most) {
  return min_of<int64_t>(max_of<int64_t>(x, 0), most);
}

// Lengths on a device are not known when a call is checked: whatever they are, a sequence stays
// within its tensors.
FAP_SHARED Sequence sequence_at(const AttentionParams& params, int64_t batch, bool paged = false) {
  Sequence sequence;
  sequence.seqlen_q = params.seqlen_q;
  sequence.seqlen_k = params.seqlen_k;
  if (params.cu_seqlens_q != nullptr) {
    sequence.q_begin = clamped(params.cu_seqlens_q[batch], params.total_q);
    sequence.seqlen_q = clamped(params.cu_seqlens_q[batch + 1] - sequence.q_begin,
                                min_of(params.seqlen_q, params.total_q - sequence.q_begin));
  }
  if (params.cu_seqlens_k != nullptr) {
    const int64_t begin = params.cu_seqlens_k[batch];
    const int64_t length = params.cu_seqlens_k[batch + 1] - begin;
    // Pages number their rows from the sequence's own start: cu_seqlens_k gives the length only.
    sequence.k_begin = paged ? 0 : clamped(begin, params.total_k);
    const int64_t room = paged ? params.seqlen_k : params.total_k - sequence.k_begin;
    sequence.seqlen_k = clamped(length, min_of(params.seqlen_k, room));
  }
  if (params.seqused_k != nullptr) {
    sequence.seqlen_k = clamped(params.seqused_k[batch] + params.seqlen_new,
                                paged ? params.seqlen_k : sequence.seqlen_k);
  }
  return sequence;
}

// Left padding and pages are forward only.
FAP_SHARED Sequence sequence_at(const ForwardParams& params, int64_t batch) {
  Sequence sequence = sequence_at(static_cast<const AttentionParams&>(params), batch,
                                  params.block_table != nullptr);
  if (params.leftpad_k != nullptr) {
    const int64_t leftpad = clamped(params.leftpad_k[batch], sequence.seqlen_k);
    sequence.k_begin += leftpad;
    sequence.seqlen_k -= leftpad;
  }
  return sequence;
}

// Element offset of one row of k or v (head 0), `row` being k_begin + j.
FAP_SHARED int64_t key_row_offset(const ForwardParams& params, const Operand& operand,
                                  int64_t batch, int64_t row) {
  if (params.block_table != nullptr) {
    const int64_t page =
        clamped(params.block_table[batch * params.block_table_stride + row / params.page_size],
                params.num_pages - 1);
    return page * operand.batch_stride + (row % params.page_size) * operand.row_stride;
  }
  const int64_t cache_row = params.cache_batch_idx != nullptr
                                ? clamped(params.cache_batch_idx[batch], params.cache_rows - 1)
                                : batch;
  return cache_row * operand.batch_stride + row * operand.row_stride;
}

}  // namespace flash_attn_plus
