// Forward and backward.
#include "attention/validate.h"

#include <algorithm>
#include <functional>

#include "attention/checks.h"
#include "attention/dropout.h"
#include "attention/error.h"
#include "attention/tensor_arg.h"

namespace flash_attn_plus {
namespace {

template <typename Args>
void check_lengths_and_shapes(const Args& args, const Qkv& t, const Pages* pages,
                              AttentionParams& params) {
  const TensorArg cu_seqlens_q("cu_seqlens_q", args.cu_seqlens_q);
  const TensorArg cu_seqlens_k("cu_seqlens_k", args.cu_seqlens_k);
  if (cu_seqlens_q) {
    params.total_q = t.q.shape(0);
    params.cu_seqlens_q = check_cu_seqlens(cu_seqlens_q, t.q, params.batch, params.total_q,
                                           "max_seqlen_q", args.max_seqlen_q, params.seqlen_q);
  } else {
    params.seqlen_q = t.q.shape(1);
    params.total_q = params.batch * params.seqlen_q;
  }
  if (pages != nullptr) {
    params.seqlen_k = pages->capacity;
    params.total_k = pages->num_pages * pages->page_size;
    for (const TensorArg& x : {t.k, t.v}) {
      check_kv_shape(x, {{"num_blocks", pages->num_pages}, {"page_block_size", pages->page_size}},
                     params);
    }
    if (cu_seqlens_k) {
      params.cu_seqlens_k = check_cu_seqlens(cu_seqlens_k, t.q, params.batch, kAny, "max_seqlen_k",
                                             args.max_seqlen_k, params.seqlen_k);
    }
  } else if (cu_seqlens_k) {
    params.total_k = t.k.shape(0);
    for (const TensorArg& x : {t.k, t.v}) check_kv_shape(x, {{"total_k", params.total_k}}, params);
    params.cu_seqlens_k = check_cu_seqlens(cu_seqlens_k, t.q, params.batch, params.total_k,
                                           "max_seqlen_k", args.max_seqlen_k, params.seqlen_k);
  } else {
    params.seqlen_k = t.k.shape(1);
    params.total_k = params.batch * params.seqlen_k;
    for (const TensorArg& x : {t.k, t.v}) {
      check_kv_shape(x, {{"batch_size", params.batch}, {"seqlen_k", params.seqlen_k}}, params);
    }
  }
}

int64_t rows_of_k(const AttentionParams& params, int64_t batch) {
  if (params.cu_seqlens_k == nullptr) return params.seqlen_k;
  return params.cu_seqlens_k[batch + 1] - params.cu_seqlens_k[batch];
}

void check_dropout(double dropout_p, const TensorArg& rng_state, const TensorArg& q,
                   AttentionParams& params) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) {
    fail("dropout_p must be in [0, 1), but is ", dropout_p);
  }
  if (dropout_p < kMinDropoutP) return;
  if (!rng_state) fail("rng_state must be given when dropout_p > 0");
  rng_state.require_same_device(q);
  if (!rng_state.is_int(64))
    fail("rng_state must have dtype int64, but has ", rng_state.dtype_name());
  rng_state.require_shape({{"2", 2}});
  rng_state.require_contiguous();
  params.dropout_p = dropout_p;
  params.rng_state = rng_state.data<const int64_t>();
}

void check_s_dmask(const TensorArg& s_dmask, const TensorArg& q, ForwardParams& params) {
  if (!s_dmask) return;
  if (params.dropout_p == 0.0) fail("s_dmask is only written when dropout_p > 0");
  s_dmask.require_same_device(q);
  check_same_dtype(s_dmask, q, "s_dmask must have the dtype of query");
  s_dmask.require_shape({{"batch_size", params.batch},
                         {"num_heads", params.num_heads},
                         {"seqlen_q_rounded", kAny},
                         {"seqlen_k_rounded", kAny}});
  if (s_dmask.shape(2) < params.seqlen_q || s_dmask.shape(3) < params.seqlen_k) {
    fail("s_dmask must have at least ", params.seqlen_q, " rows and ", params.seqlen_k,
         " columns, but got ", s_dmask.shape_string());
  }
  s_dmask.require_last_contiguous();
  s_dmask.require_writable({});
  params.s_dmask = s_dmask.data();
  params.s_dmask_batch_stride = s_dmask.stride(0);
  params.s_dmask_head_stride = s_dmask.stride(1);
  params.s_dmask_row_stride = s_dmask.stride(2);
  params.s_dmask_rows = s_dmask.shape(2);
  params.s_dmask_cols = s_dmask.shape(3);
}

}  // namespace

ForwardParams validate(const fap_forward_args& args) {
  check_struct_size(args);
  const Qkv t{{"q", args.q}, {"k", args.k}, {"v", args.v}};
  const TensorArg cu_seqlens_q("cu_seqlens_q", args.cu_seqlens_q);
  const TensorArg cu_seqlens_k("cu_seqlens_k", args.cu_seqlens_k);
  const TensorArg block_table("block_table", args.block_table);
  const bool variable_q = static_cast<bool>(cu_seqlens_q);
  ForwardParams params;
  check_qkv("forward", t, variable_q, cu_seqlens_k && !block_table, params);
  params.batch = batch_size(t.q, cu_seqlens_q);
  Pages pages;
  if (block_table) pages = check_block_table(block_table, t.k, t.q, params.batch);
  check_lengths_and_shapes(args, t, block_table ? &pages : nullptr, params);
  if (block_table) {
    set_pages(pages, params);
    if (args.seqused_k != nullptr) params.seqlen_k = pages.capacity;
    // Seen to hold on the host, below.
    if (!block_table.on_host()) params.seqlen_k = std::min(params.seqlen_k, pages.capacity);
  }

  const auto limit = [&](int64_t i) { return block_table ? pages.capacity : rows_of_k(params, i); };
  params.seqused_k = check_lengths({"seqused_k", args.seqused_k}, t.q, params.batch,
                                   std::cref(limit), "the rows of its sequence");
  params.leftpad_k = check_lengths({"leftpad_k", args.leftpad_k}, t.q, params.batch,
                                   std::cref(limit), "the rows of its sequence");
  if (block_table && block_table.on_host()) {
    for (int64_t i = 0; i < params.batch; ++i) {
      const int64_t rows = params.seqused_k != nullptr ? params.seqused_k[i] : rows_of_k(params, i);
      if (rows > pages.capacity) {
        fail("sequence ", i, " has ", rows, " keys, but its row of block_table has room for ",
             pages.capacity);
      }
      check_pages(pages, i, rows);
    }
  }
  check_scalars(args, params);
  check_alibi({"alibi_slopes", args.alibi_slopes}, t.q, params);
  check_s_aux({"s_aux", args.s_aux}, t.q, params);
  check_dropout(args.dropout_p, {"rng_state", args.rng_state}, t.q, params);
  check_outputs({"out", args.out}, {"softmax_lse", args.softmax_lse}, t, variable_q, params);
  check_s_dmask({"s_dmask", args.s_dmask}, t.q, params);
  params.num_splits = checked_num_splits(args.num_splits);
  return params;
}

BackwardParams validate(const fap_backward_args& args) {
  check_struct_size(args);
  const Qkv t{{"q", args.q}, {"k", args.k}, {"v", args.v}};
  const TensorArg cu_seqlens_q("cu_seqlens_q", args.cu_seqlens_q);
  const TensorArg cu_seqlens_k("cu_seqlens_k", args.cu_seqlens_k);
  const bool variable_q = static_cast<bool>(cu_seqlens_q);
  BackwardParams params;
  check_qkv("backward", t, variable_q, static_cast<bool>(cu_seqlens_k), params);
  params.batch = batch_size(t.q, cu_seqlens_q);
  check_lengths_and_shapes(args, t, nullptr, params);
  params.seqused_k = check_lengths(
      {"seqused_k", args.seqused_k}, t.q, params.batch,
      [&](int64_t i) { return rows_of_k(params, i); }, "the rows of its sequence");
  check_scalars(args, params);
  check_alibi({"alibi_slopes", args.alibi_slopes}, t.q, params);
  check_s_aux({"s_aux", args.s_aux}, t.q, params);
  check_dropout(args.dropout_p, {"rng_state", args.rng_state}, t.q, params);

  const TensorArg dout("dout", args.dout), out("out", args.out);
  check_like(dout, t.q, "query and dout must have the same dtype");
  check_like(out, t.q, "query and out must have the same dtype");
  params.dout = dout.operand();
  params.out = out.operand();
  const TensorArg softmax_lse("softmax_lse", args.softmax_lse);
  check_row_vector(softmax_lse, t.q, params, variable_q);
  params.softmax_lse = row_vector(softmax_lse);
  const TensorArg dsoftmax_lse("dsoftmax_lse", args.dsoftmax_lse);
  if (dsoftmax_lse) {
    check_row_vector(dsoftmax_lse, t.q, params, variable_q);
    params.dsoftmax_lse = row_vector(dsoftmax_lse);
  }

  const TensorArg dq("dq", args.dq), dk("dk", args.dk), dv("dv", args.dv);
  const TensorArg softmax_d("softmax_d", args.softmax_d), ds_aux("ds_aux", args.ds_aux);
  check_like(dq, t.q, "dq must have the same dtype as q");
  check_like(dk, t.k, "dk must have the same dtype as q");
  check_like(dv, t.v, "dv must have the same dtype as q");
  for (const TensorArg& gradient : {dq, dk, dv}) {
    gradient.require_writable({t.q, t.k, t.v, out, dout});
  }
  params.dq = dq.operand();
  params.dk = dk.operand();
  params.dv = dv.operand();
  check_row_vector(softmax_d, t.q, params, variable_q);
  softmax_d.require_writable({softmax_lse, dsoftmax_lse});
  params.softmax_d = row_vector(softmax_d);
  if (static_cast<bool>(ds_aux) != (params.s_aux != nullptr)) {
    fail("ds_aux must be given exactly when s_aux is");
  }
  if (ds_aux) {
    ds_aux.require_same_device(t.q);
    if (!ds_aux.is_float32()) fail("ds_aux must have dtype fp32, but has ", ds_aux.dtype_name());
    ds_aux.require_shape({{"num_heads", params.num_heads}});
    ds_aux.require_writable({{"s_aux", args.s_aux}});
    params.ds_aux = ds_aux.data<float>();
    params.ds_aux_stride = ds_aux.stride(0);
  }
  params.deterministic = args.deterministic != 0;
  return params;
}

}  // namespace flash_attn_plus
