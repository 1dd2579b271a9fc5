// Where each sequence of a batch lies.
#pragma once

#include <algorithm>
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

FAP_SHARED Sequence sequence_at(const AttentionParams& params, int64_t batch) {
  Sequence sequence;
  sequence.seqlen_q = params.seqlen_q;
  sequence.seqlen_k = params.seqlen_k;
  if (params.cu_seqlens_q != nullptr) {
    sequence.q_begin = params.cu_seqlens_q[batch];
    sequence.seqlen_q = params.cu_seqlens_q[batch + 1] - sequence.q_begin;
  }
  if (params.cu_seqlens_k != nullptr) {
    sequence.k_begin = params.cu_seqlens_k[batch];
    sequence.seqlen_k = params.cu_seqlens_k[batch + 1] - sequence.k_begin;
  }
  if (params.seqused_k != nullptr) sequence.seqlen_k = params.seqused_k[batch];
  return sequence;
}

// Left padding and pages are forward only. Pages number their rows from the sequence's own start.
FAP_SHARED Sequence sequence_at(const ForwardParams& params, int64_t batch) {
  Sequence sequence = sequence_at(static_cast<const AttentionParams&>(params), batch);
  if (params.block_table != nullptr) sequence.k_begin = 0;
  if (params.leftpad_k != nullptr) {
    sequence.k_begin += params.leftpad_k[batch];
    sequence.seqlen_k = std::max<int64_t>(0, sequence.seqlen_k - params.leftpad_k[batch]);
  }
  return sequence;
}

// Element offset of one row of k or v (head 0), `row` being k_begin + j.
FAP_SHARED int64_t key_row_offset(const ForwardParams& params, const Operand& operand,
                                  int64_t batch, int64_t row) {
  if (params.block_table != nullptr) {
    const int64_t page =
        params.block_table[batch * params.block_table_stride + row / params.page_size];
    return page * operand.batch_stride + (row % params.page_size) * operand.row_stride;
  }
  const int64_t cache_row =
      params.cache_batch_idx != nullptr ? params.cache_batch_idx[batch] : batch;
  return cache_row * operand.batch_stride + row * operand.row_stride;
}

}  // namespace flash_attn_plus
