#include "attention/checks.h"

#include <algorithm>

#include "attention/error.h"

namespace flash_attn_plus {
namespace {

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

}  // namespace

void check_device(const TensorArg& q) {
  q.require();
  const int type = q.device().device_type;
  if (type != kDeviceCpu && type != kDeviceCuda) {
    fail(q.name(),
         " must be on the CPU or on an NVIDIA GPU: there is no backend for devices of type ", type);
  }
}

void check_dtype(const TensorArg& q) {
  if (!q.is_float() || (q.is_float32() && !q.on_host())) {
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

void check_qkv(const char* direction, const Qkv& t, bool variable_q, bool variable_k,
               AttentionParams& params) {
  t.q.require_rank(variable_q ? 3 : 4);
  t.k.require_rank(variable_k ? 3 : 4);
  t.v.require_rank(variable_k ? 3 : 4);
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

void check_kv_shape(const TensorArg& x, std::initializer_list<Extent> leading,
                    const AttentionParams& params) {
  const Extent heads{"num_heads_k", params.num_heads_k}, dim{"head_size", params.head_dim};
  if (leading.size() == 2) {
    x.require_shape({leading.begin()[0], leading.begin()[1], heads, dim});
  } else {
    x.require_shape({leading.begin()[0], heads, dim});
  }
}

int64_t batch_size(const TensorArg& q, const TensorArg& cu_seqlens_q) {
  if (!cu_seqlens_q) return q.shape(0);
  cu_seqlens_q.require_int32();
  if (cu_seqlens_q.ndim() != 1 || cu_seqlens_q.shape(0) < 1) {
    fail("cu_seqlens_q must have shape (batch_size + 1), but got ", cu_seqlens_q.shape_string());
  }
  return cu_seqlens_q.shape(0) - 1;
}

const int32_t* check_cu_seqlens(const TensorArg& cu_seqlens, const TensorArg& q, int64_t batch,
                                int64_t total, const char* max_name, int64_t max_seqlen,
                                int64_t& longest) {
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
  if (!cu_seqlens.on_host()) {
    if (max_seqlen < 0) fail(max_name, " is ", max_seqlen, ", but must not be negative");
    longest = total == kAny ? max_seqlen : std::min(max_seqlen, total);
    return values;
  }
  const int64_t count = cu_seqlens.shape(0) - 1;
  if (values[0] != 0) fail(cu_seqlens.name(), " must start at 0, but starts at ", values[0]);
  longest = 0;
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
  // Without a page there is none that a kernel could fall back on.
  if (!block_table.on_host() && pages.num_pages == 0) pages.capacity = 0;
  return pages;
}

void set_pages(const Pages& pages, ForwardParams& params) {
  params.block_table = pages.table;
  params.block_table_stride = pages.stride;
  params.page_size = pages.page_size;
  params.num_pages = pages.num_pages;
}

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

void check_outputs(const TensorArg& out, const TensorArg& softmax_lse, const Qkv& t,
                   bool variable_q, ForwardParams& params) {
  check_like(out, t.q, "Output must have the same dtype as inputs");
  out.require_writable({t.q, t.k, t.v});
  params.out = out.operand();
  if (!softmax_lse) return;
  check_row_vector(softmax_lse, t.q, params, variable_q);
  softmax_lse.require_writable({});
  params.softmax_lse = row_vector(softmax_lse);
}

int checked_num_splits(int num_splits) {
  if (num_splits < 0) fail("num_splits must not be negative, but is ", num_splits);
  return num_splits;
}

const int32_t* check_lengths(const TensorArg& lengths, const TensorArg& q, int64_t batch,
                             const std::function<int64_t(int64_t)>& limit, const char* what) {
  if (!lengths) return nullptr;
  lengths.require_same_device(q);
  lengths.require_int32();
  lengths.require_shape({{"batch_size", batch}});
  lengths.require_contiguous();
  const int32_t* values = lengths.data<const int32_t>();
  if (!lengths.on_host()) return values;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t most = limit(i);
    if (values[i] < 0 || values[i] > most) {
      fail(lengths.name(), "[", i, "] is ", values[i], ", but must be in [0, ", most, "], ", what);
    }
  }
  return values;
}

int64_t normalized_side(int64_t side, const AttentionParams& params) {
  return side < 0 || side >= params.seqlen_q + params.seqlen_k ? -1 : side;
}

}  // namespace flash_attn_plus
