#include "attention/checks.h"
#include "attention/error.h"
#include "attention/tensor_arg.h"
#include "attention/validate.h"

namespace flash_attn_plus {

RotaryParams validate(const fap_rotary_args& args) {
  check_struct_size(args);
  const TensorArg x("x", args.x), out("out", args.out), cos("cos", args.cos), sin("sin", args.sin);
  const TensorArg offsets("seqlen_offsets", args.seqlen_offsets);
  const TensorArg cu_seqlens("cu_seqlens", args.cu_seqlens);
  x.require_rank(cu_seqlens ? 3 : 4);
  if (!x.is_float()) fail("x must have dtype fp32, fp16 or bf16, but has ", x.dtype_name());
  check_like(out, x, "out must have the same dtype as x");
  x.require_last_contiguous();
  out.require_writable({});

  RotaryParams params;
  params.dtype = x.dtype();
  params.head_dim = x.shape(x.ndim() - 1);
  params.num_heads = x.shape(x.ndim() - 2);
  params.batch = batch_size(x, cu_seqlens);
  if (cu_seqlens) {
    params.total_rows = x.shape(0);
    params.cu_seqlens = check_cu_seqlens(cu_seqlens, x, params.batch, x.shape(0), "max_seqlen",
                                         args.max_seqlen, params.seqlen);
  } else {
    params.seqlen = x.shape(1);
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
  const bool known = x.on_host() || (!offsets && !cu_seqlens);  // where the rows are
  for (int64_t i = 0; known && i < params.batch; ++i) {
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
