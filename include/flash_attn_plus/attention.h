/* FlashAttention-Plus: exact attention, the C ABI.
 *
 * Notation: batch b, query length sq, key length sk, query heads h, key heads hk (h is a multiple
 * of hk), head dimension d from 1 to 256. Variable length packs all sequences along one axis: tq
 * queries, tk keys. The conventions of every number are in docs/numerics.md.
 *
 * Every argument struct begins with its own size, so that fields can be added at its end: set
 * `size = sizeof(struct)` and everything that is not used to zero (`struct x args = {sizeof
 * args}`). First come the fields that every call sets.
 *
 * Every function returns a fap_status. On failure nothing has been computed or written, and
 * fap_last_error() gives the reason (per thread). No function throws, prints, or keeps state
 * between calls other than compiled kernels. All buffers belong to the caller.
 *
 * Tensors lie on the CPU or on an NVIDIA GPU of compute capability 8.0 or newer, all of a call on
 * one device, which need not be the current one. On a GPU a call returns when its kernels are
 * launched on `stream`: it allocates nothing there and waits for nothing. Values in device memory
 * (cu_seqlens, lengths, tables) are not read by the host; the kernels keep whatever they are within
 * the tensors. max_seqlen_q and max_seqlen_k must be bounds of the lengths: rows beyond them are
 * not computed.
 *
 * Some calls on a GPU need a workspace: device memory of any content, aligned to 256 bytes, in use
 * until the call's kernels are done. A call that needs more than it got returns FAP_NEEDS_WORKSPACE
 * and has done nothing; the CPU needs none.
 */
#ifndef FLASH_ATTN_PLUS_ATTENTION_H_
#define FLASH_ATTN_PLUS_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(FLASH_ATTN_PLUS_BUILD)
#define FAP_API __declspec(dllexport)
#else
#define FAP_API __declspec(dllimport)
#endif
#else
#define FAP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fap_status {
  FAP_OK = 0,
  FAP_ERROR = 1,            /* an argument or the machine does not allow the call */
  FAP_CONSTRAINT_ERROR = 2, /* a documented constraint on head dimension or head counts is broken */
  FAP_NEEDS_WORKSPACE = 3,  /* workspace is too small: fap_workspace_needed() says how much */
} fap_status;

/* Field for field DLPack's DLDevice, DLDataType and DLTensor (version 1): a DLTensor* may be passed
 * as a fap_tensor*. Strides are in elements; NULL strides mean row-major and compact. */
typedef struct fap_device {
  int32_t device_type; /* kDLCPU = 1, kDLCUDA = 2 */
  int32_t device_id;
} fap_device;

typedef struct fap_dtype {
  uint8_t code; /* kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 */
  uint8_t bits;
  uint16_t lanes;
} fap_dtype;

typedef struct fap_tensor {
  void* data;
  fap_device device;
  int32_t ndim;
  fap_dtype dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} fap_tensor;

/* Attention forward: dense, variable length (cu_seqlens_q and cu_seqlens_k given) and paged
 * (block_table given, keys by pages). */
typedef struct fap_forward_args {
  size_t size;
  const fap_tensor* q;           /* (b, sq, h, d) or (tq, h, d); fp32 (CPU), fp16, bf16 */
  const fap_tensor* k;           /* (b, sk, hk, d), (tk, hk, d) or (pages, page_size, hk, d) */
  const fap_tensor* v;           /* as k */
  const fap_tensor* out;         /* as q */
  const fap_tensor* softmax_lse; /* (b, h, sq) or (h, tq), fp32, or NULL */
  double softmax_scale;
  int64_t window_left;  /* negative: infinite */
  int64_t window_right; /* negative: infinite; causal makes it 0 at most */
  int32_t causal;
  int32_t num_threads;            /* CPU: at most so many threads; 0: as many as there are cores */
  void* stream;                   /* CUDA: the stream (CUstream) to launch on */
  void* workspace;                /* CUDA: see above, or NULL */
  size_t workspace_size;          /* its bytes */
  double softcap;                 /* 0: off */
  const fap_tensor* alibi_slopes; /* (h) or (b, h), fp32, or NULL */
  const fap_tensor* s_aux;        /* (h), fp32: attention sinks, or NULL */
  double dropout_p;               /* in [0, 1) */
  const fap_tensor* rng_state;    /* (2), int64: seed and offset; needed when dropout_p > 0 */
  const fap_tensor* s_dmask; /* (b, h, >= sq, >= sk), dtype of q; needs dropout_p > 0; or NULL */
  const fap_tensor* cu_seqlens_q; /* (b + 1), int32, or NULL */
  const fap_tensor* cu_seqlens_k; /* (b + 1), int32, or NULL; with block_table: lengths only */
  int64_t max_seqlen_q;           /* variable length only */
  int64_t max_seqlen_k;           /* variable length only */
  const fap_tensor* seqused_k;    /* (b), int32: keys used of each sequence, or NULL */
  const fap_tensor* leftpad_k;    /* (b), int32: first valid key of each sequence, or NULL */
  const fap_tensor* block_table;  /* (b, max pages per sequence), int32, or NULL */
  int32_t num_splits;             /* parts into which the keys are split; 0: chosen */
} fap_forward_args;

/* Attention backward. dq, dk and dv are written whole; nothing is accumulated into them. */
typedef struct fap_backward_args {
  size_t size;
  const fap_tensor* dout; /* as q */
  const fap_tensor* q;
  const fap_tensor* k;
  const fap_tensor* v;
  const fap_tensor* out;
  const fap_tensor* softmax_lse;
  const fap_tensor* dq;        /* as q */
  const fap_tensor* dk;        /* as k */
  const fap_tensor* dv;        /* as k */
  const fap_tensor* softmax_d; /* out: row sums of dout * out - dsoftmax_lse; as softmax_lse */
  double softmax_scale;
  int64_t window_left;
  int64_t window_right;
  int32_t causal;
  int32_t deterministic; /* the CPU is always deterministic */
  int32_t num_threads;
  void* stream;
  void* workspace;
  size_t workspace_size;
  double softcap;
  const fap_tensor* alibi_slopes;
  const fap_tensor* s_aux;
  const fap_tensor* ds_aux;       /* out: gradient of s_aux, (h), fp32; given iff s_aux is */
  const fap_tensor* dsoftmax_lse; /* gradient of softmax_lse, as softmax_lse, or NULL for zero */
  double dropout_p;
  const fap_tensor* rng_state;
  const fap_tensor* cu_seqlens_q;
  const fap_tensor* cu_seqlens_k;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  const fap_tensor* seqused_k;
} fap_backward_args;

/* Attention over a cache, which k and v, when given, are appended to first (in place). */
typedef struct fap_kvcache_args {
  size_t size;
  const fap_tensor* q;           /* (b, sq, h, d) */
  const fap_tensor* k_cache;     /* (bc, sk, hk, d) or (pages, page_size, hk, d) */
  const fap_tensor* v_cache;     /* as k_cache */
  const fap_tensor* out;         /* as q */
  const fap_tensor* softmax_lse; /* (b, h, sq), fp32, or NULL */
  double softmax_scale;
  int64_t window_left;
  int64_t window_right;
  int32_t causal;
  int32_t num_threads;
  void* stream;
  void* workspace;
  size_t workspace_size;
  const fap_tensor* cache_seqlens;   /* (b), int32: valid keys before appending, or NULL: all */
  const fap_tensor* k;               /* (b, snew, hk, d), or NULL */
  const fap_tensor* v;               /* as k */
  const fap_tensor* cache_batch_idx; /* (b), int32: row of the cache of each sequence, or NULL */
  const fap_tensor* cache_leftpad;   /* (b), int32: first valid key, or NULL */
  const fap_tensor* block_table;     /* (b, max pages per sequence), int32, or NULL */
  const fap_tensor* rotary_cos;      /* (>= sk, rotary_dim / 2), dtype of q, or NULL */
  const fap_tensor* rotary_sin;      /* as rotary_cos */
  int32_t rotary_interleaved; /* 1: pairs (2i, 2i+1), GPT-J; 0: pairs (i, i + rotary_dim/2), NeoX */
  double softcap;
  const fap_tensor* alibi_slopes;
  const fap_tensor* s_aux;
  int32_t num_splits;
} fap_kvcache_args;

/* Rotary position embedding of the first 2 * cos.shape[1] elements of each row; the rest is copied.
 */
typedef struct fap_rotary_args {
  size_t size;
  const fap_tensor* x;   /* (b, s, h, d), or (t, h, d) with cu_seqlens */
  const fap_tensor* out; /* as x; may be x itself */
  const fap_tensor* cos; /* (max position, rotary_dim / 2), dtype of x or fp32 */
  const fap_tensor* sin; /* as cos */
  int64_t seqlen_offset; /* position of the first row when seqlen_offsets is NULL */
  int32_t interleaved;
  int32_t conjugate; /* rotate by the negative angle: the gradient */
  int32_t num_threads;
  void* stream;
  const fap_tensor* seqlen_offsets; /* (b), int32 or int64: position of each first row, or NULL */
  const fap_tensor* cu_seqlens;     /* (b + 1), int32, or NULL */
  int64_t max_seqlen;               /* with cu_seqlens */
} fap_rotary_args;

FAP_API fap_status fap_forward(const fap_forward_args* args);
FAP_API fap_status fap_backward(const fap_backward_args* args);
FAP_API fap_status fap_kvcache(const fap_kvcache_args* args);
FAP_API fap_status fap_rotary(const fap_rotary_args* args);

/* Whether a call would be served: everything is checked as by the call itself, nothing is computed.
 * The reason of a refusal is in fap_last_error(). */
FAP_API fap_status fap_forward_supports(const fap_forward_args* args);
FAP_API fap_status fap_backward_supports(const fap_backward_args* args);

/* Whether a call is right, for tensors on a device of any type: for those who compute it
 * themselves. */
FAP_API fap_status fap_forward_check(const fap_forward_args* args);
FAP_API fap_status fap_backward_check(const fap_backward_args* args);
FAP_API fap_status fap_kvcache_check(const fap_kvcache_args* args);
FAP_API fap_status fap_rotary_check(const fap_rotary_args* args);

/* Bytes of workspace that this thread's last call needed which returned FAP_NEEDS_WORKSPACE. */
FAP_API size_t fap_workspace_needed(void);

/* Bytes of workspace that a call would need, to be prepared before it is made. */
FAP_API fap_status fap_forward_workspace(const fap_forward_args* args, size_t* bytes);
FAP_API fap_status fap_backward_workspace(const fap_backward_args* args, size_t* bytes);
FAP_API fap_status fap_kvcache_workspace(const fap_kvcache_args* args, size_t* bytes);

/* CUDA kernels are compiled when they are first used, by NVRTC, and kept on disk. It is looked for
 * in the file or directory FLASH_ATTN_PLUS_NVRTC, in these directories (separated by colons; those
 * of an earlier call are forgotten), in the toolkit, and where the loader looks. */
FAP_API fap_status fap_set_nvrtc_directories(const char* directories);

/* What calls on a GPU find here, as lines of the form `name: value`: `driver` and `compiler`, with
 * the reason where one is missing. Valid until this thread's next such call. */
FAP_API const char* fap_cuda_runtime(void);

/* The kernels that calls on a GPU of this architecture (90 is sm_90) can use, as text, one a line;
 * and the compilation of one of them into the cache on disk, for which no GPU is needed. The result
 * of that is lines of the form `name=value`: `from` (compiled or disk), `kept` (whether it is in
 * the cache), `seconds`, `registers`, `stack_bytes`, `spill_bytes`, `shared_bytes`, and `excess`,
 * what it uses beyond its limits. NULL, with the reason in fap_last_error(), for a failure. Valid
 * until this thread's next call of either. */
FAP_API const char* fap_cuda_kernels(int32_t arch);
FAP_API const char* fap_cuda_compile(int32_t arch, const char* kernel);

/* What a call on contiguous tensors of a GPU would launch. */
typedef struct fap_cuda_explain_args {
  size_t size;
  int32_t arch;      /* 90 is sm_90 */
  int32_t operation; /* 0: fap_forward, 1: fap_backward, 2: fap_kvcache */
  int32_t bfloat16;  /* else float16 */
  int64_t batch;
  int64_t seqlen_q; /* with variable_length: of the longest sequence, and of the average one */
  int64_t seqlen_k;
  int64_t num_heads;
  int64_t num_heads_k;
  int64_t head_dim;
  int32_t causal;
  int64_t window_left; /* negative: infinite */
  int64_t window_right;
  double softcap;
  double dropout_p;
  int32_t alibi;
  int32_t s_aux;
  int32_t deterministic;
  int32_t variable_length;
  int64_t page_size;  /* 0: not paged */
  int64_t seqlen_new; /* fap_kvcache: keys to append */
  int64_t rotary_dim; /* fap_kvcache: of the queries and new keys; 0: not rotated */
  int32_t num_splits;
} fap_cuda_explain_args;

/* The device, the workspace and the launches of such a call as text, without a GPU; NULL, with the
 * reason in fap_last_error(), when it would be refused. Valid until this thread's next such call.
 */
FAP_API const char* fap_cuda_explain(const fap_cuda_explain_args* args);

/* The message of this thread's last failure; never NULL, valid until this thread's next call. */
FAP_API const char* fap_last_error(void);

/* Version of the library, e.g. "0.1.0". */
FAP_API const char* fap_version(void);

/* The instruction set that the CPU kernels use, e.g. "avx512"; and all that this CPU can run, the
 * best first, separated by commas. FLASH_ATTN_PLUS_CPU_ISA names one to be used instead of the
 * best. NULL, with the reason in fap_last_error(), when that variable names one that is unknown or
 * cannot run. */
FAP_API const char* fap_cpu_isa(void);
FAP_API const char* fap_cpu_isas(void);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_PLUS_ATTENTION_H_ */
