#include "attention/validate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/dropout.h"
#include "attention/error.h"
#include "attention/tensor_arg.h"

namespace flash_attn_plus {
namespace {

constexpr int kDeviceCpu = 1;

template <typename Args>
void check_struct_size(const Args& args) {
  if (args.size != sizeof(Args)) {
    fail("size must be ", sizeof(Args), ", the size of the argument struct, but is ", args.size);
  }
}

void check_device(const TensorArg& q) {
  if (q.device().device_type != kDeviceCpu) {
    fail("q must be on the CPU: this build has no backend for devices of type ",
         q.device().device_type);
  }
}

void check_dtype(const TensorArg& q) {
  if (!q.is_float()) {
    fail("FlashAttention only support fp16 and bf16 data type (and fp32 on the CPU), but ",
         q.name(), " has ", q.dtype_name());
  }
}

void check_same_dtype(const TensorArg& x, const TensorArg& q, const char* text) {
  if (!x.is_float() || x.dtype() != q.dtype()) {
    fail(text, ", but ", q.name(), " has ", q.dtype_name(), " and ", x.name(), " has ",
         x.dtype_name());
  }
}

void check_heads(const char* direction, int64_t head_dim, int64_t num_heads, int64_t num_heads_k) {
  if (head_dim > kMaxHeadDim) {
    fail<ConstraintError>("FlashAttention ", direction,
                          " only supports head dimension at most 256, but q has ", head_dim);
  }
  if (head_dim < 1) fail<ConstraintError>("head dimension must be at least 1, but q has 0");
  if (num_heads < 1 || num_heads_k < 1 || num_heads % num_heads_k != 0) {
    fail<ConstraintError>("Number of heads in key/value must divide number of heads in query, but ",
                          "key has ", num_heads_k, " and query has ", num_heads);
  }
}

// Lengths and tables lie in host memory here, so their values are checked too.

// Non-decreasing from 0, no sequence longer than max_seqlen; `total`: rows there are, or kAny.
const int32_t* check_cu_seqlens(const TensorArg& cu_seqlens, const TensorArg& q, int64_t batch,
                                int64_t total, const char* max_name, int64_t max_seqlen) {
  cu_seqlens.require_same_device(q);
  cu_seqlens.require_int32();
  if (cu_seqlens.ndim() != 1 || cu_seqlens.shape(0) < 1 ||
      (batch != kAny && cu_seqlens.shape(0) != batch + 1)) {
    fail(cu_seqlens.name(), " must have shape (batch_size + 1)",
         batch == kAny ? "" : ", that is (" + std::to_string(batch + 1) + ")", ", but got ",
         cu_seqlens.shape_string());
  }
  cu_seqlens.require_contiguous();
  const int32_t* values = cu_seqlens.data<const int32_t>();
  const int64_t count = cu_seqlens.shape(0) - 1;
  if (values[0] != 0) fail(cu_seqlens.name(), " must start at 0, but starts at ", values[0]);
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i + 1] < values[i]) {
      fail(cu_seqlens.name(), " must not decrease, but goes from ", values[i], " to ",
           values[i + 1], " at ", i + 1);
    }
    longest = std::max<int64_t>(longest, int64_t{values[i + 1]} - values[i]);
  }
  if (total != kAny && values[count] > total) {
    fail(cu_seqlens.name(), " ends at ", values[count], ", beyond the ", total,
         " rows of its tensor");
  }
  if (longest > max_seqlen) {
    fail(max_name, " is ", max_seqlen, ", but the longest sequence of ", cu_seqlens.name(), " has ",
         longest, " rows");
  }
  return values;
}

// (batch) int32 numbers, each in [0, limit(i)].
template <typename Limit>
const int32_t* check_lengths(const TensorArg& lengths, const TensorArg& q, int64_t batch,
                             const Limit& limit, const char* what) {
  if (!lengths) return nullptr;
  lengths.require_same_device(q);
  lengths.require_int32();
  lengths.require_shape({{"batch_size", batch}});
  lengths.require_contiguous();
  const int32_t* values = lengths.data<const int32_t>();
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t most = limit(i);
    if (values[i] < 0 || values[i] > most) {
      fail(lengths.name(), "[", i, "] is ", values[i], ", but must be in [0, ", most, "], ", what);
    }
  }
  return values;
}

struct Pages {
  const int32_t* table = nullptr;
  int64_t stride = 0;
  int64_t page_size = 0;
  int64_t num_pages = 0;
  int64_t capacity = 0;  // rows that a sequence can have
};

Pages check_block_table(const TensorArg& block_table, const TensorArg& k, const TensorArg& q,
                        int64_t batch) {
  block_table.require_same_device(q);
  if (!block_table.is_int(32)) {
    fail("block_table must have dtype torch.int32, but has ", block_table.dtype_name());
  }
  block_table.require_shape({{"batch_size", batch}, {"max_num_blocks_per_seq", kAny}});
  if (block_table.numel() > 0 && block_table.shape(1) > 1 && block_table.stride(1) != 1) {
    fail("block_table must have contiguous last dimension");
  }
  Pages pages;
  pages.table = block_table.data<const int32_t>();
  pages.stride = block_table.stride(0);
  pages.num_pages = k.shape(0);
  pages.page_size = k.shape(1);
  if (pages.page_size < 1) fail(k.name(), " must have a page size of at least 1, but has 0");
  pages.capacity = block_table.shape(1) * pages.page_size;
  return pages;
}

// The pages that hold the first `rows` rows of a sequence must exist.
void check_pages(const Pages& pages, int64_t batch, int64_t rows) {
  const int64_t count = (rows + pages.page_size - 1) / pages.page_size;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t page = pages.table[batch * pages.stride + i];
    if (page < 0 || page >= pages.num_pages) {
      fail("block_table[", batch, ", ", i, "] is ", page, ", but there are ", pages.num_pages,
           " pages");
    }
  }
}

void check_alibi(const TensorArg& slopes, const TensorArg& q, AttentionParams& params) {
  if (!slopes) return;
  slopes.require_same_device(q);
  if (!slopes.is_float32()) {
    fail("ALiBi slopes must have dtype fp32, but alibi_slopes has ", slopes.dtype_name());
  }
  if (slopes.ndim() == 2) {
    slopes.require_shape({{"batch_size", params.batch}, {"num_heads", params.num_heads}});
    params.alibi_batch_stride = slopes.stride(0);
  } else {
    slopes.require_shape({{"num_heads", params.num_heads}});
  }
  params.alibi_slopes = slopes.data<const float>();
  params.alibi_head_stride = slopes.stride(slopes.ndim() - 1);
}

void check_s_aux(const TensorArg& s_aux, const TensorArg& q, AttentionParams& params) {
  if (!s_aux) return;
  s_aux.require_same_device(q);
  if (!s_aux.is_float32()) fail("s_aux must have dtype fp32, but has ", s_aux.dtype_name());
  s_aux.require_shape({{"num_heads", params.num_heads}});
  params.s_aux = s_aux.data<const float>();
  params.s_aux_stride = s_aux.stride(0);
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
  params.seed = static_cast<uint64_t>(rng_state.data<const int64_t>()[0]);
  params.offset = static_cast<uint64_t>(rng_state.data<const int64_t>()[1]);
}

// A side at least as long as everything there is cannot hide anything: it is infinite.
int64_t normalized_side(int64_t side, const AttentionParams& params) {
  return side < 0 || side >= params.seqlen_q + params.seqlen_k ? -1 : side;
}

template <typename Args>
void check_scalars(const Args& args, AttentionParams& params) {
  if (!std::isfinite(args.softmax_scale)) {
    fail("softmax_scale must be finite, but is ", args.softmax_scale);
  }
  if (!(args.softcap >= 0.0) || !std::isfinite(args.softcap)) {
    fail("softcap must be finite and not negative, but is ", args.softcap);
  }
  if (args.num_threads < 0) fail("num_threads must not be negative, but is ", args.num_threads);
  params.softmax_scale = static_cast<float>(args.softmax_scale);
  params.softcap = static_cast<float>(args.softcap);
  params.window_left = normalized_side(args.window_left, params);
  params.window_right = args.causal ? 0 : normalized_side(args.window_right, params);
  params.num_threads = args.num_threads;
}

RowVector row_vector(const TensorArg& x) {
  if (x.ndim() == 3) return {x.data<float>(), x.stride(0), x.stride(1), x.stride(2)};
  return {x.data<float>(), 0, x.stride(0), x.stride(1)};
}

void check_row_vector(const TensorArg& x, const TensorArg& q, const AttentionParams& params,
                      bool variable_q) {
  x.require();
  x.require_same_device(q);
  if (!x.is_float32()) fail(x.name(), " must have dtype fp32, but has ", x.dtype_name());
  if (variable_q) {
    x.require_shape({{"num_heads", params.num_heads}, {"total_q", params.total_q}});
  } else {
    x.require_shape({{"batch_size", params.batch},
                     {"num_heads", params.num_heads},
                     {"seqlen_q", params.seqlen_q}});
  }
}

// A tensor with the shape, dtype and device of `like`.
void check_like(const TensorArg& x, const TensorArg& like, const char* dtype_text) {
  x.require();
  x.require_same_device(like);
  check_same_dtype(x, like, dtype_text);
  if (like.ndim() == 4) {
    x.require_shape({{"batch_size", like.shape(0)},
                     {"seqlen", like.shape(1)},
                     {"num_heads", like.shape(2)},
                     {"head_size", like.shape(3)}});
  } else {
    x.require_shape(
        {{"total", like.shape(0)}, {"num_heads", like.shape(1)}, {"head_size", like.shape(2)}});
  }
  x.require_last_contiguous();
}

struct Qkv {
  TensorArg q, k, v;
};

// Ranks, dtypes, heads and the q side; k and v are checked against each other.
void check_qkv(const char* direction, const Qkv& t, bool variable_q, bool variable_k,
               AttentionParams& params) {
  t.q.require_rank(variable_q ? 3 : 4);
  t.k.require_rank(variable_k ? 3 : 4);
  t.v.require_rank(variable_k ? 3 : 4);
  check_device(t.q);
  check_dtype(t.q);
  check_same_dtype(t.k, t.q, "query and key must have the same dtype");
  check_same_dtype(t.v, t.q, "query and value must have the same dtype");
  t.k.require_same_device(t.q);
  t.v.require_same_device(t.q);
  t.q.require_last_contiguous();
  t.k.require_last_contiguous();
  t.v.require_last_contiguous();
  params.dtype = t.q.dtype();
  params.head_dim = t.q.shape(t.q.ndim() - 1);
  params.num_heads = t.q.shape(t.q.ndim() - 2);
  params.num_heads_k = t.k.shape(t.k.ndim() - 2);
  check_heads(direction, params.head_dim, params.num_heads, params.num_heads_k);
  params.q = t.q.operand();
  params.k = t.k.operand();
  params.v = t.v.operand();
}

// Shapes of k and v once it is known what their leading extents mean.
void check_kv_shape(const TensorArg& x, std::initializer_list<Extent> leading,
                    const AttentionParams& params) {
  const Extent heads{"num_heads_k", params.num_heads_k}, dim{"head_size", params.head_dim};
  if (leading.size() == 2) {
    x.require_shape({leading.begin()[0], leading.begin()[1], heads, dim});
  } else {
    x.require_shape({leading.begin()[0], heads, dim});
  }
}

// Lengths of forward and backward: cu_seqlens, max_seqlen and the shapes that follow from them.
template <typename Args>
void check_lengths_and_shapes(const Args& args, const Qkv& t, const Pages* pages,
                              AttentionParams& params) {
  const TensorArg cu_seqlens_q("cu_seqlens_q", args.cu_seqlens_q);
  const TensorArg cu_seqlens_k("cu_seqlens_k", args.cu_seqlens_k);
  if (cu_seqlens_q) {
    params.total_q = t.q.shape(0);
    params.seqlen_q = args.max_seqlen_q;
    params.cu_seqlens_q = check_cu_seqlens(cu_seqlens_q, t.q, params.batch, params.total_q,
                                           "max_seqlen_q", args.max_seqlen_q);
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
                                             args.max_seqlen_k);
      params.seqlen_k = args.max_seqlen_k;
    }
  } else if (cu_seqlens_k) {
    params.total_k = t.k.shape(0);
    params.seqlen_k = args.max_seqlen_k;
    for (const TensorArg& x : {t.k, t.v}) check_kv_shape(x, {{"total_k", params.total_k}}, params);
    params.cu_seqlens_k = check_cu_seqlens(cu_seqlens_k, t.q, params.batch, params.total_k,
                                           "max_seqlen_k", args.max_seqlen_k);
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

int64_t batch_size(const TensorArg& q, const TensorArg& cu_seqlens_q) {
  if (!cu_seqlens_q) return q.shape(0);
  cu_seqlens_q.require_int32();
  if (cu_seqlens_q.ndim() != 1 || cu_seqlens_q.shape(0) < 1) {
    fail("cu_seqlens_q must have shape (batch_size + 1), but got ", cu_seqlens_q.shape_string());
  }
  return cu_seqlens_q.shape(0) - 1;
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

void set_pages(const Pages& pages, ForwardParams& params) {
  params.block_table = pages.table;
  params.block_table_stride = pages.stride;
  params.page_size = pages.page_size;
  params.num_pages = pages.num_pages;
}

void check_outputs(const TensorArg& out, const TensorArg& softmax_lse, const Qkv& t,
                   bool variable_q, ForwardParams& params) {
  check_like(out, t.q, "Output must have the same dtype as inputs");
  out.require_writable({t.q, t.k, t.v});
  params.out = out.operand();
  check_row_vector(softmax_lse, t.q, params, variable_q);
  softmax_lse.require_writable({});
  params.softmax_lse = row_vector(softmax_lse);
}

int checked_num_splits(int num_splits) {
  if (num_splits < 0) fail("num_splits must not be negative, but is ", num_splits);
  return num_splits;
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
  if (block_table) set_pages(pages, params);

  const auto limit = [&](int64_t i) { return block_table ? pages.capacity : rows_of_k(params, i); };
  params.seqused_k = check_lengths({"seqused_k", args.seqused_k}, t.q, params.batch, limit,
                                   "the rows of its sequence");
  params.leftpad_k = check_lengths({"leftpad_k", args.leftpad_k}, t.q, params.batch, limit,
                                   "the rows of its sequence");
  if (block_table) {
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
  append.rotary_cos = cos.data();
  append.rotary_sin = sin.data();
  append.rotary_cos_stride = cos.stride(0);
  append.rotary_sin_stride = sin.stride(0);
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
    call.seqused_k.resize(static_cast<size_t>(params.batch));
    for (int64_t i = 0; i < params.batch; ++i) {
      const int64_t length = params.seqused_k[i] + seqlen_new;
      if (length > capacity) {
        fail("cache_seqlens[", i, "] is ", params.seqused_k[i], ": with ", seqlen_new,
             " new keys it passes the end of the KV cache, which has room for ", capacity);
      }
      call.seqused_k[static_cast<size_t>(i)] = static_cast<int32_t>(length);
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
    append.cache_batch_idx = params.cache_batch_idx;
    append.block_table = params.block_table;
    append.block_table_stride = params.block_table_stride;
    append.page_size = params.page_size;
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
  if (block_table) {
    for (int64_t i = 0; i < params.batch; ++i) {
      const int64_t rows = call.appends                  ? call.seqused_k[static_cast<size_t>(i)]
                           : params.seqused_k != nullptr ? params.seqused_k[i]
                                                         : capacity;
      check_pages(pages, i, rows);
    }
  }

  check_scalars(args, params);
  append.rotate_q_by_row = params.window_left >= 0 || params.window_right >= 0;
  if (call.appends) params.seqused_k = call.seqused_k.data();
  check_alibi({"alibi_slopes", args.alibi_slopes}, t.q, params);
  check_s_aux({"s_aux", args.s_aux}, t.q, params);
  check_outputs({"out", args.out}, {"softmax_lse", args.softmax_lse}, t, false, params);
  params.num_splits = checked_num_splits(args.num_splits);
  return call;
}

RotaryParams validate(const fap_rotary_args& args) {
  check_struct_size(args);
  const TensorArg x("x", args.x), out("out", args.out), cos("cos", args.cos), sin("sin", args.sin);
  const TensorArg offsets("seqlen_offsets", args.seqlen_offsets);
  const TensorArg cu_seqlens("cu_seqlens", args.cu_seqlens);
  x.require_rank(cu_seqlens ? 3 : 4);
  if (x.device().device_type != kDeviceCpu) {
    fail("x must be on the CPU: this build has no backend for devices of type ",
         x.device().device_type);
  }
  check_dtype(x);
  check_like(out, x, "out must have the same dtype as x");
  x.require_last_contiguous();
  out.require_writable({});

  RotaryParams params;
  params.dtype = x.dtype();
  params.head_dim = x.shape(x.ndim() - 1);
  params.num_heads = x.shape(x.ndim() - 2);
  params.batch = batch_size(x, cu_seqlens);
  params.seqlen = cu_seqlens ? args.max_seqlen : x.shape(1);
  if (cu_seqlens) {
    params.cu_seqlens =
        check_cu_seqlens(cu_seqlens, x, params.batch, x.shape(0), "max_seqlen", args.max_seqlen);
  }
  params.x = x.operand();
  params.out = out.operand();

  cos.require_rank(2);
  cos.require_same_device(x);
  sin.require();
  sin.require_same_device(x);
  if (!cos.is_float() || (cos.dtype() != params.dtype && cos.dtype() != DType::kFloat32)) {
    fail("cos must have the dtype of x (", x.dtype_name(), ") or float32, but has ",
         cos.dtype_name());
  }
  check_same_dtype(sin, cos, "cos and sin must have the same dtype");
  sin.require_shape({{"seqlen_ro", cos.shape(0)}, {"rotary_dim / 2", cos.shape(1)}});
  cos.require_last_contiguous();
  sin.require_last_contiguous();
  params.rotary_dim = 2 * cos.shape(1);
  if (params.rotary_dim > params.head_dim) {
    fail("rotary_dim must be <= headdim, but is ", params.rotary_dim, " with headdim ",
         params.head_dim);
  }
  params.table_dtype = cos.dtype();
  params.cos = cos.data();
  params.sin = sin.data();
  params.cos_stride = cos.stride(0);
  params.sin_stride = sin.stride(0);
  params.num_positions = cos.shape(0);

  if (offsets) {
    offsets.require_same_device(x);
    offsets.require_shape({{"batch_size", params.batch}});
    offsets.require_contiguous();
    if (offsets.is_int(32)) {
      params.seqlen_offsets32 = offsets.data<const int32_t>();
    } else if (offsets.is_int(64)) {
      params.seqlen_offsets64 = offsets.data<const int64_t>();
    } else {
      fail("seqlen_offsets must have dtype int32 or int64, but has ", offsets.dtype_name());
    }
  }
  for (int64_t i = 0; i < params.batch; ++i) {
    const int64_t first = params.seqlen_offsets32 != nullptr   ? params.seqlen_offsets32[i]
                          : params.seqlen_offsets64 != nullptr ? params.seqlen_offsets64[i]
                                                               : args.seqlen_offset;
    const int64_t rows = params.cu_seqlens == nullptr
                             ? params.seqlen
                             : params.cu_seqlens[i + 1] - params.cu_seqlens[i];
    if (rows > 0 && (first < 0 || first > params.num_positions - rows)) {
      fail("cos and sin have ", params.num_positions, " positions, but sequence ", i, " has ", rows,
           " rows from position ", first);
    }
  }
  params.seqlen_offset = args.seqlen_offset;
  params.interleaved = args.interleaved != 0;
  params.conjugate = args.conjugate != 0;
  if (args.num_threads < 0) fail("num_threads must not be negative, but is ", args.num_threads);
  params.num_threads = args.num_threads;
  return params;
}

}  // namespace flash_attn_plus
