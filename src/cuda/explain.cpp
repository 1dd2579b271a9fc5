#include "cuda/explain.h"

#include <algorithm>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <sstream>
#include <vector>

#include "attention/error.h"
#include "attention/tensor_arg.h"
#include "attention/validate.h"
#include "cuda/cuda.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/recorder.h"

namespace flash_attn_plus::cuda {
namespace {

constexpr fap_dtype kInt32 = {0, 32, 1}, kInt64 = {0, 64, 1}, kFloat32 = {2, 32, 1};

// Views of memory that does not exist, on a device that stands for an architecture.
class Views {
 public:
  explicit Views(int arch) : device_{kDeviceCuda, -arch} {}

  const fap_tensor* make(fap_dtype dtype, std::initializer_list<int64_t> shape) {
    std::vector<int64_t>& extents = shapes_.emplace_back(shape);
    fap_tensor& view = views_.emplace_back();
    view.data = reinterpret_cast<void*>(uintptr_t{1} << 40 | uintptr_t{views_.size()} << 12);
    view.device = device_;
    view.ndim = static_cast<int32_t>(extents.size());
    view.dtype = dtype;
    view.shape = extents.data();
    return &view;
  }

 private:
  fap_device device_;
  std::deque<std::vector<int64_t>> shapes_;  // of stable addresses
  std::deque<fap_tensor> views_;
};

template <typename Args>
void set_options(const fap_cuda_explain_args& call, Views& views, Args& args) {
  args.size = sizeof(Args);
  args.softmax_scale = 1.0;
  args.window_left = call.window_left;
  args.window_right = call.window_right;
  args.causal = call.causal;
  args.softcap = call.softcap;
  if (call.alibi) args.alibi_slopes = views.make(kFloat32, {call.num_heads});
  if (call.s_aux) args.s_aux = views.make(kFloat32, {call.num_heads});
}

// The tensors of a call by their roles.
class Tensors {
 public:
  explicit Tensors(const fap_cuda_explain_args& call)
      : views(call.arch),
        call_(call),
        dtype_(call.bfloat16 ? fap_dtype{4, 16, 1} : fap_dtype{2, 16, 1}) {}

  const fap_tensor* like_q() { return rows(call_.seqlen_q, call_.num_heads); }
  const fap_tensor* like_k() {
    if (call_.page_size == 0) return rows(call_.seqlen_k, call_.num_heads_k);
    return views.make(dtype_,
                      {call_.batch * pages(), call_.page_size, call_.num_heads_k, call_.head_dim});
  }
  const fap_tensor* new_keys() {
    return views.make(dtype_, {call_.batch, call_.seqlen_new, call_.num_heads_k, call_.head_dim});
  }
  const fap_tensor* row_vector() {
    if (call_.variable_length) {
      return views.make(kFloat32, {call_.num_heads, call_.batch * call_.seqlen_q});
    }
    return views.make(kFloat32, {call_.batch, call_.num_heads, call_.seqlen_q});
  }
  const fap_tensor* rotary_table() {
    const int64_t positions = std::max(call_.seqlen_q, call_.seqlen_k) + call_.page_size;
    return views.make(dtype_, {positions, call_.rotary_dim / 2});
  }
  const fap_tensor* block_table() {
    return call_.page_size == 0 ? nullptr : views.make(kInt32, {call_.batch, pages()});
  }

  Views views;

 private:
  const fap_tensor* rows(int64_t seqlen, int64_t heads) {
    if (call_.variable_length) {
      return views.make(dtype_, {call_.batch * seqlen, heads, call_.head_dim});
    }
    return views.make(dtype_, {call_.batch, seqlen, heads, call_.head_dim});
  }
  int64_t pages() const { return (call_.seqlen_k + call_.page_size - 1) / call_.page_size; }

  const fap_cuda_explain_args& call_;
  fap_dtype dtype_;
};

// What forward and backward have in common.
template <typename Args>
Args attention_args(const fap_cuda_explain_args& call, Tensors& tensors) {
  Args args = {};
  set_options(call, tensors.views, args);
  args.q = tensors.like_q();
  args.k = tensors.like_k();
  args.v = tensors.like_k();
  args.out = tensors.like_q();
  args.softmax_lse = tensors.row_vector();
  if (call.variable_length) {
    args.cu_seqlens_q = tensors.views.make(kInt32, {call.batch + 1});
    args.cu_seqlens_k = tensors.views.make(kInt32, {call.batch + 1});
    args.max_seqlen_q = call.seqlen_q;
    args.max_seqlen_k = call.seqlen_k;
  }
  args.dropout_p = call.dropout_p;
  if (call.dropout_p > 0) args.rng_state = tensors.views.make(kInt64, {2});
  return args;
}

fap_forward_args forward_args(const fap_cuda_explain_args& call, Tensors& tensors) {
  auto args = attention_args<fap_forward_args>(call, tensors);
  args.block_table = tensors.block_table();
  if (args.block_table != nullptr) args.seqused_k = tensors.views.make(kInt32, {call.batch});
  args.num_splits = call.num_splits;
  return args;
}

fap_backward_args backward_args(const fap_cuda_explain_args& call, Tensors& tensors) {
  auto args = attention_args<fap_backward_args>(call, tensors);
  args.dout = tensors.like_q();
  args.dq = tensors.like_q();
  args.dk = tensors.like_k();
  args.dv = tensors.like_k();
  args.softmax_d = tensors.row_vector();
  if (call.s_aux) args.ds_aux = tensors.views.make(kFloat32, {call.num_heads});
  args.deterministic = call.deterministic;
  return args;
}

fap_kvcache_args kvcache_args(const fap_cuda_explain_args& call, Tensors& tensors) {
  if (call.variable_length)
    fail("a cache holds sequences of equal capacity: variable_length is off");
  fap_kvcache_args args = {};
  set_options(call, tensors.views, args);
  args.q = tensors.like_q();
  args.k_cache = tensors.like_k();
  args.v_cache = tensors.like_k();
  args.out = tensors.like_q();
  args.softmax_lse = tensors.row_vector();
  args.cache_seqlens = tensors.views.make(kInt32, {call.batch});
  args.block_table = tensors.block_table();
  if (call.seqlen_new > 0) {
    args.k = tensors.new_keys();
    args.v = tensors.new_keys();
  }
  if (call.rotary_dim > 0) {
    args.rotary_cos = tensors.rotary_table();
    args.rotary_sin = tensors.rotary_table();
  }
  args.num_splits = call.num_splits;
  return args;
}

// Blocks of threads that a multiprocessor holds at once, as far as shared memory and threads say.
int resident_blocks(const RecordedLaunch& launch, const DeviceProperties& device) {
  constexpr int kReserved = 1024;  // bytes that every block takes beside its own
  return std::min(device.shared_per_multiprocessor / (launch.shared_bytes + kReserved),
                  device.threads_per_multiprocessor / launch.threads);
}

std::string describe(const LaunchRecorder& recorder, size_t workspace,
                     const DeviceProperties& device) {
  std::ostringstream text;
  text << device.name << ": " << device.num_multiprocessors << " multiprocessors, "
       << device.max_shared_per_block / 1024 << " kB of shared memory for a block\n"
       << "workspace: " << workspace << " bytes\n";
  for (const RecordedLaunch& launch : recorder.launches()) {
    text << launch.kernel << "\n  " << launch.blocks << " blocks of " << launch.threads
         << " threads, " << launch.shared_bytes << " bytes of shared memory; at most "
         << resident_blocks(launch, device) << " of them at once on a multiprocessor\n";
  }
  return text.str();
}

template <typename Params, typename Workspace, typename Run>
std::string record(const Params& params, const DeviceProperties& device, Workspace workspace,
                   Run run) {
  Call call;
  call.device = device.ordinal;
  call.workspace_bytes = workspace(params, call.device);
  call.workspace = reinterpret_cast<void*>(uintptr_t{1} << 39);
  LaunchRecorder recorder;
  run(params, call);
  return describe(recorder, call.workspace_bytes, device);
}

}  // namespace

std::string explain(const fap_cuda_explain_args& call) {
  if (call.batch < 0 || call.seqlen_q < 0 || call.seqlen_k < 0 || call.page_size < 0 ||
      call.seqlen_new < 0 || call.rotary_dim < 0) {
    fail("extents must not be negative");
  }
  const DeviceProperties& device = device_properties(-call.arch);
  Tensors tensors(call);
  switch (call.operation) {
    case 0:
      return record(validate(forward_args(call, tensors)), device, &forward_workspace, &forward);
    case 1:
      return record(validate(backward_args(call, tensors)), device, &backward_workspace, &backward);
    case 2:
      return record(validate(kvcache_args(call, tensors)), device, &kvcache_workspace, &kvcache);
    default:
      fail("operation must be 0 (forward), 1 (backward) or 2 (kvcache), but is ", call.operation);
  }
}

}  // namespace flash_attn_plus::cuda
