// The checks that several operations make; each throws Error or ConstraintError with the name of
// the argument, what was expected and what was given. The values of lengths and tables are checked
// where the host can read them; on a device they are not looked at, and kernels keep whatever they
// are within the tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <initializer_list>

#include "attention/error.h"
#include "attention/params.h"
#include "attention/tensor_arg.h"

namespace flash_attn_plus {

struct Qkv {
  TensorArg q, k, v;
};

struct Pages {
  const int32_t* table = nullptr;
  int64_t stride = 0;
  int64_t page_size = 0;
  int64_t num_pages = 0;
  int64_t capacity = 0;  // rows that a sequence can have
};

template <typename Args>
void check_struct_size(const Args& args) {
  if (args.size != sizeof(Args)) {
    fail("size must be ", sizeof(Args), ", the size of the argument struct, but is ", args.size);
  }
}

void check_device(const TensorArg& x);  // a device that this build serves
void check_dtype(const TensorArg& x);   // of attention
void check_same_dtype(const TensorArg& x, const TensorArg& like, const char* text);
// Shape, dtype and device of `like`.
void check_like(const TensorArg& x, const TensorArg& like, const char* dtype_text);

// Ranks, dtypes, devices and heads; sets what follows from them. `direction` is "forward" or
// "backward".
void check_qkv(const char* direction, const Qkv& t, bool variable_q, bool variable_k,
               AttentionParams& params);

// Shape of k or v, once it is known what the leading extents mean.
void check_kv_shape(const TensorArg& x, std::initializer_list<Extent> leading,
                    const AttentionParams& params);

int64_t batch_size(const TensorArg& q, const TensorArg& cu_seqlens_q);

// From 0, non-decreasing, no sequence longer than max_seqlen, within `total` rows (or kAny). Sets
// `longest`, which on a device is max_seqlen, or `total` where that is less.
const int32_t* check_cu_seqlens(const TensorArg& cu_seqlens, const TensorArg& q, int64_t batch,
                                int64_t total, const char* max_name, int64_t max_seqlen,
                                int64_t& longest);

// (batch) int32 numbers, each in [0, limit(i)]; null when not given. `what`: whose limit that is.
const int32_t* check_lengths(const TensorArg& lengths, const TensorArg& q, int64_t batch,
                             const std::function<int64_t(int64_t)>& limit, const char* what);

Pages check_block_table(const TensorArg& block_table, const TensorArg& k, const TensorArg& q,
                        int64_t batch);
void set_pages(const Pages& pages, ForwardParams& params);
// The pages that hold the first `rows` rows of a sequence must exist.
void check_pages(const Pages& pages, int64_t batch, int64_t rows);

void check_alibi(const TensorArg& slopes, const TensorArg& q, AttentionParams& params);
void check_s_aux(const TensorArg& s_aux, const TensorArg& q, AttentionParams& params);

RowVector row_vector(const TensorArg& x);
// (b, h, sq) or (h, tq), fp32.
void check_row_vector(const TensorArg& x, const TensorArg& q, const AttentionParams& params,
                      bool variable_q);
void check_outputs(const TensorArg& out, const TensorArg& softmax_lse, const Qkv& t,
                   bool variable_q, ForwardParams& params);
int checked_num_splits(int num_splits);

// A side of the window at least as long as everything there is hides nothing: it is infinite (-1).
int64_t normalized_side(int64_t side, const AttentionParams& params);

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

}  // namespace flash_attn_plus
