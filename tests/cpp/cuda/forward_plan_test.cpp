// Which forward kernel serves a call, and how its blocks are numbered: plans for GPUs that are not
// there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "attention/error.h"
#include "cuda/plan/forward.h"
#include "cuda/plan/kind.h"
#include "cuda/runtime/spec_text.h"

namespace flash_attn_plus::cuda {
namespace {

ForwardParams call(int64_t batch, int64_t seqlen, int64_t heads, int64_t heads_k,
                   int64_t head_dim) {
  ForwardParams params;
  params.dtype = DType::kBFloat16;
  params.batch = batch;
  params.num_heads = heads;
  params.num_heads_k = heads_k;
  params.head_dim = head_dim;
  params.seqlen_q = params.seqlen_k = seqlen;
  params.total_q = params.total_k = batch * seqlen;
  params.softmax_scale = 0.1f;
  params.q = params.out = {nullptr, seqlen * heads * head_dim, heads * head_dim, head_dim};
  params.k = params.v = {nullptr, seqlen * heads_k * head_dim, heads_k * head_dim, head_dim};
  return params;
}

TEST(FastDivisor, IsDivision) {
  for (const uint32_t divisor : {1u, 2u, 3u, 5u, 7u, 64u, 127u, 128u, 129u, 1000u, 65535u, 65536u,
                                 65537u, 1000003u, (1u << 30) + 1, (1u << 31) - 1}) {
    const FastDivisor fast(divisor);
    for (const int64_t multiple : {0, 1, 2, 3, 1000, 32767}) {
      for (const int64_t rest : {-1, 0, 1}) {
        const int64_t x = multiple * divisor + rest;
        if (x < 0 || x > INT32_MAX) continue;
        EXPECT_EQ(fast.quotient(static_cast<uint32_t>(x)), x / divisor) << x << " / " << divisor;
        EXPECT_EQ(fast.remainder(static_cast<uint32_t>(x)), x % divisor) << x << " % " << divisor;
      }
    }
    EXPECT_EQ(fast.quotient(INT32_MAX), INT32_MAX / divisor);
  }
}

class ForwardPlanOn : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Architectures, ForwardPlanOn, ::testing::ValuesIn(known_architectures()));

TEST_P(ForwardPlanOn, EverySpecFitsTheMultiprocessor) {
  const DeviceProperties device = typical_device(GetParam());
  for (const ForwardSpec& spec : all_forward_specs(device)) {
    EXPECT_LE(spec.shared_bytes(), device.max_shared_per_block) << to_text(spec);
    EXPECT_LE(spec.min_blocks * (spec.shared_bytes() + 1024), device.shared_per_multiprocessor)
        << to_text(spec);
    EXPECT_LE(spec.threads() * spec.min_blocks * 128, device.registers_per_multiprocessor)
        << to_text(spec) << ": less than 128 registers a thread";
  }
}

TEST_P(ForwardPlanOn, EveryCallIsServedByAListedSpec) {
  const DeviceProperties device = typical_device(GetParam());
  const std::vector<ForwardSpec> specs = all_forward_specs(device);
  const float slope = 0;
  const int32_t table = 0;
  const int64_t rng_state[2] = {0, 0};
  for (int64_t head_dim = 1; head_dim <= kMaxHeadDim; head_dim += 3) {
    for (int flags = 0; flags < 64; ++flags) {
      ForwardParams params = call(2, 100, 4, 2, head_dim);
      if (flags & 1) params.dtype = DType::kFloat16;
      if (flags & 2) params.softcap = 30;
      if (flags & 4) params.alibi_slopes = &slope;
      if (flags & 8) {
        params.dropout_p = 0.5;
        params.rng_state = rng_state;
      }
      if (flags & 16) params.block_table = &table;
      if (flags & 32) params.window_left = 3;
      const ForwardSpec spec = plan_forward(params, device).spec;
      EXPECT_NE(std::find(specs.begin(), specs.end(), spec), specs.end()) << to_text(spec);
      EXPECT_GE(spec.head_dim, head_dim);
      EXPECT_EQ(spec.softcap, params.softcap > 0) << to_text(spec);
      EXPECT_EQ(spec.paged, params.block_table != nullptr) << to_text(spec);
      EXPECT_TRUE(spec.alibi || params.alibi_slopes == nullptr) << to_text(spec);
      EXPECT_TRUE(spec.dropout || params.dropout_p == 0) << to_text(spec);
      EXPECT_TRUE(spec.masking == Masking::kWindow || params.window_left < 0) << to_text(spec);
      EXPECT_TRUE(head_dim % 8 == 0 || spec.access == Access::kElement) << to_text(spec);
    }
  }
}

TEST(ForwardPlan, AScaleThatIsNotPositiveIsAppliedBeforeTheMaximum) {
  ForwardParams params = call(1, 64, 1, 1, 64);
  for (const float scale : {-0.1f, 0.0f}) {
    params.softmax_scale = scale;
    EXPECT_TRUE(plan_forward(params, typical_device(90)).spec.transformed());
  }
  params.softmax_scale = 0.1f;
  EXPECT_FALSE(plan_forward(params, typical_device(90)).spec.transformed());
}

TEST(ForwardPlan, UnalignedOperandsAreReadOneByOne) {
  const DeviceProperties device = typical_device(90);
  ForwardParams params = call(2, 100, 4, 2, 64);
  EXPECT_EQ(plan_forward(params, device).spec.access, Access::kWhole);
  params.k.row_stride += 1;
  EXPECT_EQ(plan_forward(params, device).spec.access, Access::kElement);
  EXPECT_EQ(plan_forward(call(2, 100, 4, 2, 72), device).spec.access, Access::kPadded);
}

// Every block of rows of every head is computed once, whatever the grouping.
TEST(ForwardPlan, BlocksCoverAllRowsOnce) {
  const DeviceProperties device = typical_device(90);
  using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
  for (const auto& [batch, seqlen, heads, heads_k] :
       {Shape{3, 1000, 5, 5}, Shape{1, 128, 1, 1}, Shape{70, 512, 32, 8}, Shape{2, 16384, 16, 2}}) {
    const ForwardPlan plan = plan_forward(call(batch, seqlen, heads, heads_k, 128), device);
    std::set<std::tuple<uint32_t, uint32_t, uint32_t>> seen;
    for (uint32_t i = 0; i < plan.args.num_attention_blocks; ++i) {
      const ForwardBlock block = plan.args.block_at(i);
      EXPECT_LT(block.batch, batch);
      EXPECT_LT(block.head, heads);
      EXPECT_LT(block.row_block, plan.args.num_row_blocks);
      seen.insert({block.batch, block.head, block.row_block});
    }
    EXPECT_EQ(seen.size(), plan.args.num_attention_blocks);
    EXPECT_EQ(plan.shape.blocks, plan.args.num_row_blocks * batch * heads);
  }
}

TEST(ForwardPlan, RefusesWhatOneLaunchCannotHold) {
  const DeviceProperties device = typical_device(90);
  EXPECT_THROW(plan_forward(call(1 << 20, 128, 4096, 4096, 64), device), Error);
  EXPECT_THROW(plan_forward(call(1, int64_t{1} << 30, 1, 1, 64), device), Error);
}

}  // namespace
}  // namespace flash_attn_plus::cuda
