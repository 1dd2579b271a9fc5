// What a validated call means: plain numbers and pointers, the same for every backend.
//
// Notation: batch b, query heads h, key heads hk, head dimension d. All strides are in elements and
// every operand has a contiguous last dimension.
#pragma once

#include <cstdint>

#include "attention/shared.h"

namespace flash_attn_plus {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t kMaxHeadDim = 256;

// Rows of d elements: (b, s, heads, d); variable length (t, heads, d) with batch_stride 0; or pages
// (pages, page_size, heads, d), batch_stride being the stride of a page.
struct Operand {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// One float32 a query row: (b, h, sq), or (h, tq) with batch_stride 0.
struct RowVector {
  float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 1;

  // Nothing when nobody asked for it.
  FAP_SHARED void set(int64_t batch, int64_t head, int64_t row, float value) const {
    if (data != nullptr) data[batch * batch_stride + head * head_stride + row * row_stride] = value;
  }
};

// What forward and backward have in common.
struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t num_heads = 0;    // h
  int64_t num_heads_k = 0;  // hk, divides h; query head i uses key head i / (h / hk)
  int64_t head_dim = 0;     // d
  int64_t seqlen_q = 0;     // rows of q in each sequence; the longest one's when variable length
  int64_t seqlen_k = 0;     // rows of k in each sequence (before seqused_k); the longest one's
  int64_t total_q = 0;      // rows of q in all, those beyond cu_seqlens_q[b] included
  int64_t total_k = 0;      // rows of k in all, those beyond cu_seqlens_k[b] included

  Operand q, k, v, out;
  RowVector softmax_lse;

  const int32_t* cu_seqlens_q = nullptr;  // (b + 1) or null
  const int32_t* cu_seqlens_k = nullptr;  // (b + 1) or null
  const int32_t* seqused_k = nullptr;     // (b) or null: keys in use of each sequence
  int64_t seqlen_new = 0;                 // keys in use beyond those that seqused_k counts

  const float* alibi_slopes = nullptr;  // null: no ALiBi
  int64_t alibi_batch_stride = 0;       // 0 when shared by the batch
  int64_t alibi_head_stride = 0;
  const float* s_aux = nullptr;  // (h) attention sinks, or null
  int64_t s_aux_stride = 0;

  float softmax_scale = 1.0f;
  float softcap = 0.0f;       // 0: off
  int64_t window_left = -1;   // -1: infinite
  int64_t window_right = -1;  // -1: infinite; causal is 0

  double dropout_p = 0.0;              // 0: off
  const int64_t* rng_state = nullptr;  // (2) seed and offset; given iff dropout_p > 0

  int num_threads = 0;  // CPU: 0 means as many as there are cores

  FAP_SHARED int64_t group_size() const {
    return num_heads / num_heads_k;
  }  // query heads per key head
};

struct ForwardParams : AttentionParams {
  const int32_t* leftpad_k = nullptr;        // (b) or null: rows of k before the first valid one
  const int32_t* cache_batch_idx = nullptr;  // (b) or null: which batch row of k and v to use
  int64_t cache_rows = 0;                    // batch rows of k and v; meaningful with the above
  const int32_t* block_table = nullptr;      // (b, ...) pages of each sequence, or null
  int64_t block_table_stride = 0;
  int64_t page_size = 0;  // rows of a page, any number from 1; 0 when not paged
  int64_t num_pages = 0;  // pages in k and v

  void* s_dmask = nullptr;  // (b, h, sq, sk) in dtype, columns contiguous, or null
  int64_t s_dmask_batch_stride = 0;
  int64_t s_dmask_head_stride = 0;
  int64_t s_dmask_row_stride = 0;
  int64_t s_dmask_rows = 0;  // rows and columns there are; those beyond sq, sk are written as 0
  int64_t s_dmask_cols = 0;

  int num_splits = 0;  // parts into which the keys are split; 0: plan_splits() chooses
};

struct BackwardParams : AttentionParams {
  Operand dout;
  Operand dq, dk, dv;       // written whole: rows of no sequence get 0
  RowVector dsoftmax_lse;   // data null: zero
  RowVector softmax_d;      // out: row sums of dout * out, less dsoftmax_lse
  float* ds_aux = nullptr;  // (h) out; given iff s_aux is
  int64_t ds_aux_stride = 0;
  bool deterministic = false;
};

// Writes k and v into the caches at each sequence's length, k rotated, and q_rotated from q.
struct AppendParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t num_heads = 0, num_heads_k = 0, head_dim = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_new = 0;  // rows of k and v; 0 when there are none
  Operand q, q_rotated;    // q_rotated.data null: q is not rotated
  Operand k, v, k_cache, v_cache;
  const int32_t* cache_seqlens = nullptr;  // (b) keys before these
  int64_t capacity = 0;  // rows that a sequence's cache has: none is written from there on
  const int32_t* cache_batch_idx = nullptr;
  int64_t cache_rows = 0;  // batch rows of the caches; meaningful with the above
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int64_t page_size = 0;
  int64_t num_pages = 0;

  const void* rotary_cos = nullptr;  // (positions, rotary_dim / 2) in dtype, null: no rotation
  const void* rotary_sin = nullptr;
  int64_t num_positions = 0;      // of the tables
  int64_t rotary_cos_stride = 0;  // of a position
  int64_t rotary_sin_stride = 0;
  int64_t rotary_dim = 0;
  bool rotary_interleaved = false;
  bool rotate_q_by_row = false;  // q row i at its cache length + i, else all rows alike
  int num_threads = 0;
};

// The cache function is an append followed by a forward over the longer cache. Where q is rotated,
// its buffer append.q_rotated and forward.q are left to the backend, which owns that buffer.
struct KvCacheParams {
  bool appends = false;  // there are new keys
  AppendParams append;
  ForwardParams forward;
};

// Rotary embedding of a whole tensor.
struct RotaryParams {
  DType dtype = DType::kFloat32;
  int64_t batch = 0, seqlen = 0, num_heads = 0, head_dim = 0;
  Operand x, out;
  const void* cos = nullptr;  // (positions, rotary_dim / 2), null never
  const void* sin = nullptr;
  DType table_dtype = DType::kFloat32;
  int64_t cos_stride = 0, sin_stride = 0;
  int64_t num_positions = 0;
  int64_t rotary_dim = 0;
  const int32_t* cu_seqlens = nullptr;  // (b + 1) or null
  int64_t total_rows = 0;               // of x, with cu_seqlens; those of no sequence are copied
  const int32_t* seqlen_offsets32 = nullptr;  // (b), at most one of the two is given
  const int64_t* seqlen_offsets64 = nullptr;
  int64_t seqlen_offset = 0;
  bool interleaved = false;
  bool conjugate = false;
  int num_threads = 0;
};

}  // namespace flash_attn_plus
