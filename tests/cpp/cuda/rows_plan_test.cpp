// How rotary embedding and the append to a cache are launched.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/plan/rows.h"

namespace flash_attn_plus::cuda {
namespace {

RotaryParams rotary_call(int64_t batch, int64_t seqlen, int64_t heads, int64_t head_dim,
                         int64_t rotary_dim) {
  RotaryParams params;
  params.dtype = params.table_dtype = DType::kBFloat16;
  params.batch = batch;
  params.seqlen = seqlen;
  params.num_heads = heads;
  params.head_dim = head_dim;
  params.rotary_dim = rotary_dim;
  params.x = params.out = {nullptr, seqlen * heads * head_dim, heads * head_dim, head_dim};
  params.cos_stride = params.sin_stride = rotary_dim / 2;
  return params;
}

TEST(RotaryPlan, VectorsNeedAlignedRowsTablesAndParts) {
  const DeviceProperties device = typical_device(90);
  const auto vector = [&](const RotaryParams& params) {
    return plan_rotary(params, device).spec.vector;
  };
  EXPECT_TRUE(vector(rotary_call(2, 41, 4, 64, 32)));
  EXPECT_FALSE(vector(rotary_call(2, 41, 4, 64, 22)));
  EXPECT_FALSE(vector(rotary_call(2, 41, 4, 60, 32)));
  EXPECT_FALSE(vector(rotary_call(2, 41, 4, 64, 24)));
  RotaryParams params = rotary_call(2, 41, 4, 64, 32);
  params.cos_stride = 17;
  EXPECT_FALSE(vector(params));
  params = rotary_call(2, 41, 4, 64, 24);
  params.dtype = params.table_dtype = DType::kFloat32;  // 4 numbers a vector
  EXPECT_TRUE(vector(params));
}

TEST(RotaryPlan, BlocksCoverAllRows) {
  const DeviceProperties device = typical_device(90);
  for (const int64_t seqlen : {0, 1, 7, 1000, 100000}) {
    for (const int64_t heads : {1, 32, 5000}) {
      const RotaryPlan plan = plan_rotary(rotary_call(3, seqlen, heads, 128, 128), device);
      const int64_t blocks = plan.args.blocks_per_sequence;
      EXPECT_GE(blocks * plan.args.rows_per_block, seqlen);
      EXPECT_EQ(plan.shape.blocks, 3 * blocks);
    }
  }
}

TEST(RotaryPlan, RowsOfNoSequenceAreCopiedEvenAlone) {
  RotaryParams params = rotary_call(0, 0, 4, 64, 32);
  const int32_t cu_seqlens[] = {0};
  params.cu_seqlens = cu_seqlens;
  params.total_rows = 5;
  EXPECT_EQ(plan_rotary(params, typical_device(90)).shape.blocks, 5);
}

TEST(RotaryPlan, NeverPassesTheLimitOfAGrid) {
  const RotaryPlan plan = plan_rotary(rotary_call(1 << 20, 1 << 20, 1, 2, 2), typical_device(90));
  EXPECT_LT(plan.shape.blocks, int64_t{1} << 31);
}

AppendParams append_call(int64_t seqlen_new, int64_t rotary_dim) {
  AppendParams params;
  params.dtype = DType::kFloat16;
  params.batch = 3;
  params.num_heads = 32;
  params.num_heads_k = 8;
  params.head_dim = 128;
  params.seqlen_q = params.seqlen_new = seqlen_new;
  params.q = params.q_rotated = {nullptr, seqlen_new * 4096, 4096, 128};
  params.k = params.v = {nullptr, seqlen_new * 1024, 1024, 128};
  params.k_cache = params.v_cache = {nullptr, 1 << 20, 1024, 128};
  params.capacity = 1024;
  params.rotary_dim = rotary_dim;
  alignas(16) static const float table[4] = {};
  params.rotary_cos = params.rotary_sin = rotary_dim > 0 ? table : nullptr;
  params.rotary_cos_stride = params.rotary_sin_stride = rotary_dim / 2;
  return params;
}

TEST(AppendPlan, CoversKeysValuesAndRotatedQueries) {
  for (const int64_t rows : {1, 5, 1000}) {
    for (const int64_t rotary_dim : {0, 64}) {
      const AppendPlan plan = plan_append(append_call(rows, rotary_dim));
      const AppendArgs& args = plan.args;
      EXPECT_GE(int64_t{args.new_blocks} * args.new_rows_per_block, rows);
      if (rotary_dim > 0) {
        EXPECT_GE(int64_t{args.q_blocks} * args.q_rows_per_block, rows);
      } else {
        EXPECT_EQ(args.q_blocks, 0u);
      }
      EXPECT_EQ(plan.shape.blocks, 3 * (2 * int64_t{args.new_blocks} + args.q_blocks));
      EXPECT_EQ(plan.spec.rotates, rotary_dim > 0);
    }
  }
  EXPECT_EQ(plan_append(append_call(0, 0)).shape.blocks, 0);
}

TEST(AppendPlan, ChoosesAmongTheEnumeratedSpecs) {
  const std::vector<AppendSpec> specs = all_append_specs();
  for (const int64_t rotary_dim : {0, 64}) {
    for (const bool interleaved : {false, true}) {
      for (const int64_t offset : {0, 2}) {
        AppendParams params = append_call(4, rotary_dim);
        params.rotary_interleaved = interleaved;
        params.k_cache.data = reinterpret_cast<void*>(offset);
        const AppendSpec spec = plan_append(params).spec;
        EXPECT_EQ(spec.vector, offset == 0);
        EXPECT_NE(std::find(specs.begin(), specs.end(), spec), specs.end());
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn_plus::cuda
