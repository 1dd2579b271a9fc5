// The C ABI on tensors of a GPU. Their addresses are not mapped: whatever the host read there would
// end the test.
#include <cstdint>

#include "cuda/fixture.h"
#include "flash_attn_plus/attention.hpp"

namespace flash_attn_plus::cuda {
namespace {

constexpr fap_device kDevice = {2, 1};

void* address(int index) {
  return reinterpret_cast<void*>(uintptr_t{0x7000'0000'0000} + (uintptr_t{1} << 32) * index);
}

Tensor on_device(int index, fap_dtype dtype, std::vector<int64_t> shape) {
  return Tensor(address(index), dtype, std::move(shape), {}, kDevice);
}

// Two sequences of 300 queries and 400 keys, 4 query heads over 2 key heads, head dimension 128.
class CudaApiTest : public CompilingTest {
 protected:
  CudaApiTest() {
    forward_.q = q_;
    forward_.k = k_;
    forward_.v = v_;
    forward_.out = out_;
    forward_.softmax_lse = lse_;
    forward_.stream = &stream_;
  }

  template <typename Args>
  void expect_refused(fap_status (*function)(const Args*), const Args& args,
                      const std::string& text) {
    const int launches = state().launches;
    EXPECT_NE(function(&args), FAP_OK);
    EXPECT_NE(std::string(fap_last_error()).find(text), std::string::npos) << fap_last_error();
    EXPECT_EQ(state().launches, launches);
  }

  // With the workspace that it asks for.
  template <typename Args>
  void expect_runs(fap_status (*function)(const Args*), Args args) {
    const int launches = state().launches;
    fap_status status = function(&args);
    if constexpr (requires { args.workspace; }) {
      if (status == FAP_NEEDS_WORKSPACE) {
        EXPECT_EQ(state().launches, launches);
        EXPECT_GT(fap_workspace_needed(), 0u);
        args.workspace = address(99);
        args.workspace_size = fap_workspace_needed();
        status = function(&args);
      }
    }
    EXPECT_EQ(status, FAP_OK) << fap_last_error();
    EXPECT_GT(state().launches, launches);
    EXPECT_EQ(state().device, 1);
    EXPECT_EQ(state().stream, &stream_);
    EXPECT_EQ(contexts(), 0);  // what was current is so again
  }

  int stream_ = 0;
  const Tensor q_ = on_device(1, kBFloat16Type, {2, 300, 4, 128});
  const Tensor k_ = on_device(2, kBFloat16Type, {2, 400, 2, 128});
  const Tensor v_ = on_device(3, kBFloat16Type, {2, 400, 2, 128});
  const Tensor out_ = on_device(4, kBFloat16Type, {2, 300, 4, 128});
  const Tensor lse_ = on_device(5, kFloat32Type, {2, 4, 300});
  fap_forward_args forward_ = make_args<fap_forward_args>();
};

TEST_F(CudaApiTest, ForwardIsLaunchedOnItsDeviceAndStream) {
  forward_.causal = 1;
  expect_runs(&fap_forward, forward_);
  const fap_forward_args& args = forward_;
  EXPECT_EQ(fap_forward_supports(&args), FAP_OK);
  size_t bytes = 1;
  EXPECT_EQ(fap_forward_workspace(&args, &bytes), FAP_OK);
}

TEST_F(CudaApiTest, BackwardAsksForItsWorkspace) {
  const Tensor dout = on_device(6, kBFloat16Type, {2, 300, 4, 128});
  const Tensor dq = on_device(7, kBFloat16Type, {2, 300, 4, 128});
  const Tensor dk = on_device(8, kBFloat16Type, {2, 400, 2, 128});
  const Tensor dv = on_device(9, kBFloat16Type, {2, 400, 2, 128});
  const Tensor softmax_d = on_device(10, kFloat32Type, {2, 4, 300});
  fap_backward_args args = make_args<fap_backward_args>();
  args.q = q_;
  args.k = k_;
  args.v = v_;
  args.out = out_;
  args.softmax_lse = lse_;
  args.dout = dout;
  args.dq = dq;
  args.dk = dk;
  args.dv = dv;
  args.softmax_d = softmax_d;
  args.stream = &stream_;
  expect_runs(&fap_backward, args);
  args.workspace = static_cast<char*>(address(99)) + 8;
  expect_refused(&fap_backward, args, "workspace must be aligned to 256 bytes");
}

TEST_F(CudaApiTest, LengthsAndTablesOnTheDeviceAreNotRead) {
  const Tensor q = on_device(1, kBFloat16Type, {600, 4, 128});
  const Tensor k = on_device(2, kBFloat16Type, {50, 16, 2, 128});
  const Tensor v = on_device(3, kBFloat16Type, {50, 16, 2, 128});
  const Tensor out = on_device(4, kBFloat16Type, {600, 4, 128});
  const Tensor lse = on_device(5, kFloat32Type, {4, 600});
  const Tensor cu_seqlens = on_device(6, kInt32Type, {4});
  const Tensor used = on_device(7, kInt32Type, {3});
  const Tensor table = on_device(8, kInt32Type, {3, 20});
  const Tensor rng_state = on_device(9, kInt64Type, {2});
  forward_.q = q;
  forward_.k = k;
  forward_.v = v;
  forward_.out = out;
  forward_.softmax_lse = lse;
  forward_.cu_seqlens_q = forward_.cu_seqlens_k = cu_seqlens;
  forward_.max_seqlen_q = forward_.max_seqlen_k = 1000;
  forward_.seqused_k = used;
  forward_.leftpad_k = used;
  forward_.block_table = table;
  forward_.rng_state = rng_state;
  forward_.dropout_p = 0.5;
  expect_runs(&fap_forward, forward_);
  forward_.max_seqlen_q = -1;
  expect_refused(&fap_forward, forward_, "max_seqlen_q is -1, but must not be negative");
}

TEST_F(CudaApiTest, CachesAreAppendedToAndReadWithoutTheHost) {
  const Tensor new_k = on_device(6, kBFloat16Type, {2, 300, 2, 128});
  const Tensor new_v = on_device(7, kBFloat16Type, {2, 300, 2, 128});
  const Tensor cos = on_device(8, kBFloat16Type, {400, 32}),
               sin = on_device(9, kBFloat16Type, {400, 32});
  const Tensor lengths = on_device(10, kInt32Type, {2});
  fap_kvcache_args args = make_args<fap_kvcache_args>();
  args.q = q_;
  args.k_cache = k_;
  args.v_cache = v_;
  args.out = out_;
  args.stream = &stream_;
  expect_runs(&fap_kvcache, args);
  args.k = new_k;
  args.v = new_v;
  args.rotary_cos = cos;
  args.rotary_sin = sin;
  args.cache_seqlens = lengths;
  args.cache_batch_idx = lengths;
  args.cache_leftpad = lengths;
  expect_runs(&fap_kvcache, args);
}

TEST_F(CudaApiTest, RotaryTakesFloat32Too) {
  for (const fap_dtype dtype : {kFloat32Type, kFloat16Type, kBFloat16Type}) {
    const Tensor x = on_device(1, dtype, {2, 300, 4, 128}),
                 out = on_device(2, dtype, {2, 300, 4, 128});
    const Tensor cos = on_device(3, kFloat32Type, {400, 32}),
                 sin = on_device(4, kFloat32Type, {400, 32});
    const Tensor offsets = on_device(5, kInt64Type, {2});
    fap_rotary_args args = make_args<fap_rotary_args>();
    args.x = x;
    args.out = out;
    args.cos = cos;
    args.sin = sin;
    args.stream = &stream_;
    expect_runs(&fap_rotary, args);
    args.seqlen_offset = 200;
    expect_refused(&fap_rotary, args, "cos and sin have 400 positions");
    args.seqlen_offsets = offsets;
    expect_runs(&fap_rotary, args);
  }
}

TEST_F(CudaApiTest, Float32AttentionIsRefused) {
  const Tensor q = on_device(1, kFloat32Type, {2, 300, 4, 128});
  forward_.q = forward_.k = forward_.v = q;
  expect_refused(&fap_forward, forward_,
                 "FlashAttention only support fp16 and bf16 data type (and fp32 on the CPU)");
}

TEST_F(CudaApiTest, OtherDevicesAreRefused) {
  const Tensor k(address(2), kBFloat16Type, {2, 400, 2, 128}, {}, {2, 0});
  forward_.k = k;
  expect_refused(&fap_forward, forward_, "k must be on the same device as q");
}

TEST_F(CudaApiTest, OldDevicesAreRefused) {
  setenv("FAKE_CUDA_DEVICES", "3", 1);
  setenv("FAKE_CUDA_ARCH", "75", 1);
  const Tensor x(address(1), kBFloat16Type, {1, 1, 1, 128}, {}, {2, 2});
  const Tensor out(address(2), kBFloat16Type, {1, 1, 1, 128}, {}, {2, 2});
  fap_forward_args args = make_args<fap_forward_args>();
  args.q = args.k = args.v = x;
  args.out = out;
  expect_refused(&fap_forward, args, "compute capability 8.0 (Ampere) or newer");
  expect_refused(&fap_forward_supports, args, "has 7.5");
  setenv("FAKE_CUDA_ARCH", "80", 1);
  EXPECT_EQ(fap_forward_supports(&args), FAP_OK) << fap_last_error();
  unsetenv("FAKE_CUDA_DEVICES");
  unsetenv("FAKE_CUDA_ARCH");
}

TEST_F(CudaApiTest, EmptyCallsRun) {
  const Tensor q = on_device(1, kBFloat16Type, {0, 300, 4, 128}),
               k = on_device(2, kBFloat16Type, {0, 400, 2, 128});
  const Tensor out = on_device(4, kBFloat16Type, {0, 300, 4, 128}),
               lse = on_device(5, kFloat32Type, {0, 4, 300});
  forward_.q = q;
  forward_.k = forward_.v = k;
  forward_.out = out;
  forward_.softmax_lse = lse;
  EXPECT_EQ(fap_forward(&forward_), FAP_OK) << fap_last_error();
}

}  // namespace
}  // namespace flash_attn_plus::cuda
