// The cache function: an append followed by a forward over the longer cache.
#include "attention/checks.h"
#include "attention/error.h"
#include "attention/tensor_arg.h"
#include "attention/validate.h"

namespace flash_attn_plus {
namespace {

void check_rotary_tables(const TensorArg& cos, const TensorArg& sin, const TensorArg& q,
                         int64_t capacity, AppendParams& append) {
  if (!sin) fail("If rotary cos is provided, rotary sin must also be provided");
  cos.require_rank(2);
  cos.require_same_device(q);
  sin.require_same_device(q);
  append.rotary_dim = 2 * cos.shape(1);
  if (append.rotary_dim > append.head_dim) {
    fail("rotary_dim must be <= headdim, but is ", append.rotary_dim, " with headdim ",
         append.head_dim);
  }
  if (append.rotary_dim % 16 != 0) {
    fail("Only rotary dimensions divisible by 16 are currently supported, but rotary_cos has ",
         append.rotary_dim);
  }
  if (cos.shape(0) < capacity) {
    fail("cos/sin seqlen must be at least the seqlen of KV cache, but is ", cos.shape(0), " with ",
         capacity);
  }
  sin.require_shape({{"seqlen_ro", cos.shape(0)}, {"rotary_dim / 2", cos.shape(1)}});
  check_same_dtype(cos, q, "rotary_cos must have the same dtype as query");
  check_same_dtype(sin, q, "rotary_sin must have the same dtype as query");
  cos.require_last_contiguous();
  sin.require_last_contiguous();
  append.num_positions = cos.shape(0);
  append.rotary_cos = cos.data();
  append.rotary_sin = sin.data();
  append.rotary_cos_stride = cos.stride(0);
  append.rotary_sin_stride = sin.stride(0);
}

// The tables must reach as far as the queries, which may be more than the new keys.
void check_query_positions(const TensorArg& cos, const ForwardParams& params,
                           const AppendParams& append) {
  if (params.seqlen_q == 0) return;
  for (int64_t i = 0; i < params.batch; ++i) {
    const int64_t last =
        append.cache_seqlens[i] + (append.rotate_q_by_row ? params.seqlen_q - 1 : 0);
    if (last >= cos.shape(0)) {
      fail("rotary_cos and rotary_sin have ", cos.shape(0), " positions, but a query of sequence ",
           i, " is at position ", last);
    }
  }
}

}  // namespace

KvCacheParams validate(const fap_kvcache_args& args) {
  check_struct_size(args);
  const Qkv t{{"q", args.q}, {"k_cache", args.k_cache}, {"v_cache", args.v_cache}};
  const TensorArg k("k", args.k), v("v", args.v);
  const TensorArg cache_seqlens("cache_seqlens", args.cache_seqlens);
  const TensorArg cache_batch_idx("cache_batch_idx", args.cache_batch_idx);
  const TensorArg block_table("block_table", args.block_table);
  const TensorArg rotary_cos("rotary_cos", args.rotary_cos),
      rotary_sin("rotary_sin", args.rotary_sin);

  KvCacheParams call;
  ForwardParams& params = call.forward;
  check_qkv("forward", t, false, false, params);
  params.batch = t.q.shape(0);
  params.seqlen_q = t.q.shape(1);
  params.total_q = params.batch * params.seqlen_q;

  Pages pages;
  int64_t cache_rows = t.k.shape(0);  // batch rows of an unpaged cache
  if (block_table) {
    if (cache_batch_idx) fail("Paged KVcache does not support cache_batch_idx");
    pages = check_block_table(block_table, t.k, t.q, params.batch);
    set_pages(pages, params);
    params.seqlen_k = pages.capacity;
  } else {
    if (!cache_batch_idx) cache_rows = params.batch;
    params.seqlen_k = t.k.shape(1);
  }
  for (const TensorArg& cache : {t.k, t.v}) {
    if (block_table) {
      check_kv_shape(cache, {{"num_blocks", pages.num_pages}, {"page_block_size", pages.page_size}},
                     params);
    } else {
      check_kv_shape(cache, {{"batch_size", cache_rows}, {"seqlen_cache", params.seqlen_k}},
                     params);
    }
  }
  params.total_k = t.k.shape(0) * t.k.shape(1);
  const int64_t capacity = params.seqlen_k;

  if (cache_batch_idx && cache_rows == 0 && params.batch > 0) fail("k_cache has no batch rows");
  params.cache_batch_idx = check_lengths(
      cache_batch_idx, t.q, params.batch, [&](int64_t) { return cache_rows - 1; },
      "the batch rows of the cache");
  params.cache_rows = cache_rows;
  const auto limit = [&](int64_t) { return capacity; };
  params.seqused_k =
      check_lengths(cache_seqlens, t.q, params.batch, limit, "the length of the KV cache");
  params.leftpad_k = check_lengths({"cache_leftpad", args.cache_leftpad}, t.q, params.batch, limit,
                                   "the length of the KV cache");

  if (static_cast<bool>(k) != static_cast<bool>(v)) {
    fail(k ? "If key is supplied, value must also be passed in"
           : "If value is supplied, key must also be passed in");
  }
  AppendParams& append = call.append;
  append.head_dim = params.head_dim;
  if (k) {
    if (!cache_seqlens) fail("If key is supplied, seqlens_k must also be passed in");
    for (const TensorArg& x : {k, v}) {
      x.require_rank(4);
      x.require_same_device(t.q);
      check_same_dtype(x, t.q, "new key and value must have the same dtype as query");
      x.require_last_contiguous();
    }
    const int64_t seqlen_new = k.shape(1);
    for (const TensorArg& x : {k, v}) {
      check_kv_shape(x, {{"batch_size", params.batch}, {"seqlen_knew", seqlen_new}}, params);
    }
    if (seqlen_new > capacity) {
      fail("If key is supplied, it must have seqlen <= the seqlen of the KV cache, but has ",
           seqlen_new, " with ", capacity);
    }
    t.k.require_writable({t.q, k, v});
    t.v.require_writable({t.q, k, v, t.k});
    params.seqlen_new = seqlen_new;
    for (int64_t i = 0; cache_seqlens.on_host() && i < params.batch; ++i) {
      if (params.seqused_k[i] + seqlen_new > capacity) {
        fail("cache_seqlens[", i, "] is ", params.seqused_k[i], ": with ", seqlen_new,
             " new keys it passes the end of the KV cache, which has room for ", capacity);
      }
    }
    call.appends = true;
    append.dtype = params.dtype;
    append.batch = params.batch;
    append.num_heads = params.num_heads;
    append.num_heads_k = params.num_heads_k;
    append.seqlen_q = params.seqlen_q;
    append.seqlen_new = seqlen_new;
    append.q = params.q;
    append.k = k.operand();
    append.v = v.operand();
    append.k_cache = params.k;
    append.v_cache = params.v;
    append.cache_seqlens = params.seqused_k;
    append.capacity = capacity;
    append.cache_batch_idx = params.cache_batch_idx;
    append.cache_rows = cache_rows;
    append.block_table = params.block_table;
    append.block_table_stride = params.block_table_stride;
    append.page_size = params.page_size;
    append.num_pages = params.num_pages;
    append.rotary_interleaved = args.rotary_interleaved != 0;
    append.num_threads = args.num_threads;
  }
  if (rotary_cos || rotary_sin) {
    if (!rotary_cos) fail("If rotary sin is provided, rotary cos must also be provided");
    if (!k) {
      fail(
          "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
          "provided");
    }
    check_rotary_tables(rotary_cos, rotary_sin, t.q, capacity, append);
  }
  if (block_table && block_table.on_host()) {
    for (int64_t i = 0; i < params.batch; ++i) {
      const int64_t rows =
          params.seqused_k != nullptr ? params.seqused_k[i] + params.seqlen_new : capacity;
      check_pages(pages, i, rows);
    }
  }

  check_scalars(args, params);
  // As asked for: a window that hides nothing counts.
  append.rotate_q_by_row = args.causal || args.window_left >= 0 || args.window_right >= 0;
  if (rotary_cos && rotary_cos.on_host()) check_query_positions(rotary_cos, params, append);
  check_alibi({"alibi_slopes", args.alibi_slopes}, t.q, params);
  check_s_aux({"s_aux", args.s_aux}, t.q, params);
  check_outputs({"out", args.out}, {"softmax_lse", args.softmax_lse}, t, false, params);
  params.num_splits = checked_num_splits(args.num_splits);
  return call;
}

}  // namespace flash_attn_plus
