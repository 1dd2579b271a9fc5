// The choice and the launch of the CUDA backward kernels, on every architecture, without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/plan/backward.h"
#include "cuda/plan/kind.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/spec_text.h"

namespace flash_attn_plus::cuda {
namespace {

BackwardParams dense_call(int64_t batch, int64_t seqlen, int64_t heads, int64_t head_dim) {
  BackwardParams params;
  params.dtype = DType::kBFloat16;
  params.batch = batch;
  params.num_heads = heads;
  params.num_heads_k = heads;
  params.head_dim = head_dim;
  params.seqlen_q = params.seqlen_k = seqlen;
  params.total_q = params.total_k = batch * seqlen;
  const Operand rows{nullptr, seqlen * heads * head_dim, heads * head_dim, head_dim};
  params.q = params.k = params.v = params.out = params.dout = rows;
  params.dq = params.dk = params.dv = rows;
  return params;
}

class BackwardPlanTest : public testing::TestWithParam<int> {
 protected:
  DeviceProperties device() const { return typical_device(GetParam()); }
};

TEST_P(BackwardPlanTest, EverySpecFitsTheDevice) {
  const DeviceProperties device = this->device();
  const BackwardSpecs specs = all_backward_specs(device);
  for (const BackwardSpec& spec : specs.main) {
    SCOPED_TRACE(to_text(spec));
    EXPECT_LE(spec.shared_bytes(), device.max_shared_per_block);
    EXPECT_LE(spec.min_blocks * (spec.shared_bytes() + 1024), device.shared_per_multiprocessor);
    // dK, dV and the scores in registers, with room for what multiplies them.
    const int registers =
        std::min(255, device.registers_per_multiprocessor / (spec.min_blocks * spec.threads()));
    const int accumulators =
        (2 * spec.tile_n * spec.head_dim + 2 * spec.tile_m * spec.tile_n) / spec.threads();
    EXPECT_LE(accumulators + 40, registers);
    EXPECT_EQ(spec.vector_add, device.arch >= 90);
  }
  for (const BackwardConvertSpec& spec : specs.convert) {
    EXPECT_LE(spec.shared_bytes(), 48 * 1024) << to_text(spec);
  }
}

TEST_P(BackwardPlanTest, WarpsShareEveryProductEvenly) {
  for (const BackwardSpec& spec : all_backward_specs(device()).main) {
    SCOPED_TRACE(to_text(spec));
    const auto shared_evenly = [&](int rows, int columns, int over_rows) {
      return over_rows > 0 && spec.num_warps % over_rows == 0 && rows % (16 * over_rows) == 0 &&
             columns % (16 * (spec.num_warps / over_rows)) == 0;
    };
    EXPECT_TRUE(shared_evenly(spec.tile_m, spec.tile_n, spec.score_warps_m));
    EXPECT_TRUE(shared_evenly(spec.tile_n, spec.head_dim, spec.key_warps_n));
    EXPECT_TRUE(shared_evenly(spec.tile_m, spec.head_dim, spec.query_warps_m));
  }
}

TEST_P(BackwardPlanTest, PlansAreAmongTheSpecs) {
  const BackwardSpecs specs = all_backward_specs(device());
  const auto contains = [](const auto& list, const auto& spec) {
    return std::find(list.begin(), list.end(), spec) != list.end();
  };
  for (int64_t head_dim = 1; head_dim <= kMaxHeadDim; ++head_dim) {
    for (int flags = 0; flags < 16; ++flags) {
      BackwardParams params = dense_call(2, 100, 4, head_dim);
      const float slope = 0.0f;
      const int64_t rng_state[2] = {0, 0};
      params.deterministic = flags & 1;
      params.softcap = flags & 2 ? 30.0f : 0.0f;
      params.alibi_slopes = flags & 4 ? &slope : nullptr;
      params.dropout_p = flags & 8 ? 0.1 : 0.0;
      params.rng_state = flags & 8 ? rng_state : nullptr;
      const BackwardPlan plan = plan_backward(params, device());
      EXPECT_TRUE(contains(specs.main, plan.main)) << to_text(plan.main);
      EXPECT_TRUE(contains(specs.prepare, plan.prepare)) << to_text(plan.prepare);
      EXPECT_TRUE(contains(specs.convert, plan.convert)) << to_text(plan.convert);
      EXPECT_GE(plan.main.head_dim, head_dim);
      EXPECT_GE(plan.main.deterministic, params.deterministic);
      EXPECT_EQ(plan.main.softcap, params.softcap > 0);
      EXPECT_GE(plan.main.alibi, params.alibi_slopes != nullptr);
      EXPECT_GE(plan.main.dropout, params.dropout_p > 0);
    }
  }
}

// The order in which parts of dQ are added follows from the tiles alone.
TEST_P(BackwardPlanTest, TilesDoNotDependOnTheNumberOfMultiprocessors) {
  DeviceProperties small = device();
  small.num_multiprocessors = 1;
  for (const int head_dim : kTileHeadDims) {
    const BackwardParams params = dense_call(3, 1000, 8, head_dim);
    const BackwardPlan a = plan_backward(params, device()), b = plan_backward(params, small);
    EXPECT_EQ(a.main, b.main);
    EXPECT_EQ(a.workspace_bytes, b.workspace_bytes);
  }
}

TEST_P(BackwardPlanTest, WorkspaceIsOneFloat32DqAndCounters) {
  BackwardParams params = dense_call(2, 1024, 8, 128);
  const size_t dq = 2 * 1024 * 8 * 128 * sizeof(float);
  EXPECT_EQ(plan_backward(params, device()).workspace_bytes, dq);
  params.deterministic = true;
  EXPECT_LE(plan_backward(params, device()).workspace_bytes, dq + dq / 1024);
}

TEST_P(BackwardPlanTest, EmptyCallsLaunchNoEmptyGrid) {
  for (const int64_t batch : {0, 2}) {
    for (const int64_t seqlen_q : {0, 70}) {
      for (const int64_t seqlen_k : {0, 70}) {
        BackwardParams params = dense_call(batch, seqlen_q, 4, 64);
        params.seqlen_k = seqlen_k;
        params.total_k = batch * seqlen_k;
        const BackwardPlan plan = plan_backward(params, device());
        EXPECT_EQ(plan.main_shape.blocks > 0, batch > 0 && seqlen_k > 0);
        EXPECT_EQ(plan.convert_shape.blocks > 0, batch > 0 && seqlen_q > 0);
        EXPECT_GT(plan.prepare_shape.blocks, 0);
        EXPECT_EQ(plan.sink_shape.blocks, 0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, BackwardPlanTest, testing::ValuesIn(known_architectures()),
                         [](const auto& info) { return "sm_" + std::to_string(info.param); });

// With variable length the blocks of a sequence follow from where it begins: none may be shared,
// and none lie outside the workspace.
TEST(BackwardAccumulatorTest, SequencesHaveBlocksOfTheirOwn) {
  std::mt19937 random(1);
  const DeviceProperties device = typical_device(90);
  for (int round = 0; round < 200; ++round) {
    BackwardParams params = dense_call(1 + random() % 6, 0, 2, 64);
    std::vector<int32_t> cu_seqlens{static_cast<int32_t>(random() % 3)};
    for (int64_t i = 0; i < params.batch; ++i) {
      const int32_t length = static_cast<int32_t>(random() % 4 * (random() % 200));
      cu_seqlens.push_back(cu_seqlens.back() + length);
      params.seqlen_q = std::max<int64_t>(params.seqlen_q, length);
    }
    params.cu_seqlens_q = params.cu_seqlens_k = cu_seqlens.data();
    params.seqlen_k = params.seqlen_q;
    params.total_q = params.total_k = cu_seqlens.back() + static_cast<int64_t>(random() % 3);
    BackwardPlan plan = plan_backward(params, device);
    const int64_t blocks = static_cast<int64_t>(plan.counters_offset) /
                           (plan.main.tile_m * plan.main.head_dim * int64_t{sizeof(float)});
    std::vector<int> uses(blocks, 0);
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (int64_t i = 0; i < params.batch; ++i) {
        const int64_t length = cu_seqlens[i + 1] - cu_seqlens[i];
        const int64_t first =
            plan.args.first_accumulator_block(i, cu_seqlens[i]) + head * plan.args.blocks_per_head;
        for (int64_t row = 0; row < length; row += plan.main.tile_m) {
          const int64_t block = first + row / plan.main.tile_m;
          ASSERT_GE(block, 0);
          ASSERT_LT(block, blocks);
          EXPECT_EQ(uses[block]++, 0);
        }
      }
    }
  }
}

// What a warp adds at a time is contiguous, and every number has a place of its own.
TEST(BackwardAccumulatorTest, FragmentsFillABlock) {
  for (const bool vector_add : {false, true}) {
    constexpr int kRows = 32, kHeadDim = 48;
    std::vector<int> uses(kRows * kHeadDim, 0);
    for (int row16 = 0; row16 < kRows / 16; ++row16) {
      for (int col8 = 0; col8 < kHeadDim / 8; ++col8) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int index = accumulator_index(vector_add, kHeadDim, row16, col8, lane, i);
            EXPECT_EQ(uses.at(index)++, 0);
            const int beside = vector_add ? i : lane;
            EXPECT_EQ(index % (vector_add ? 4 : 32), beside);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn_plus::cuda
