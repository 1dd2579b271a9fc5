// Which calls decode serves, and how their keys are split: plans for GPUs that are not there.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "attention/split.h"
#include "cuda/plan/decode.h"
#include "cuda/plan/kind.h"
#include "cuda/runtime/spec_text.h"

namespace flash_attn_plus::cuda {
namespace {

ForwardParams call(int64_t batch, int64_t seqlen_q, int64_t heads, int64_t heads_k,
                   int64_t head_dim, int64_t keys) {
  ForwardParams params;
  params.dtype = DType::kBFloat16;
  params.batch = batch;
  params.num_heads = heads;
  params.num_heads_k = heads_k;
  params.head_dim = head_dim;
  params.seqlen_q = seqlen_q;
  params.seqlen_k = keys;
  params.total_q = batch * seqlen_q;
  params.total_k = batch * keys;
  params.q = params.out = {nullptr, seqlen_q * heads * head_dim, heads * head_dim, head_dim};
  params.k = params.v = {nullptr, keys * heads_k * head_dim, heads_k * head_dim, head_dim};
  return params;
}

TEST(DecodePlan, ServesFewRowsOfAGroup) {
  const DeviceProperties device = typical_device(90);
  EXPECT_TRUE(plan_decode(call(2, 1, 32, 8, 128, 4096), device));
  EXPECT_TRUE(plan_decode(call(2, 64, 8, 8, 128, 4096), device));
  EXPECT_TRUE(plan_decode(call(2, 16, 32, 8, 128, 0), device));
  EXPECT_FALSE(plan_decode(call(16, 65, 8, 8, 128, 4096), device));
  EXPECT_FALSE(plan_decode(call(16, 17, 32, 8, 128, 4096), device));
  EXPECT_FALSE(plan_decode(call(0, 1, 32, 8, 128, 4096), device));
  EXPECT_FALSE(plan_decode(call(2, 0, 32, 8, 128, 4096), device));
}

TEST(DecodePlan, ServesLongKeysThatWouldLeaveTheMachineIdle) {
  const DeviceProperties device = typical_device(90);
  EXPECT_TRUE(plan_decode(call(1, 256, 8, 8, 128, 65536), device));
  EXPECT_FALSE(plan_decode(call(1, 256, 8, 8, 128, 1024), device));
  ForwardParams windowed = call(1, 256, 8, 8, 128, 65536);
  windowed.window_left = 512;
  windowed.window_right = 0;
  EXPECT_FALSE(plan_decode(windowed, device));
}

TEST(DecodePlan, LeavesDropoutToTheForwardKernel) {
  const DeviceProperties device = typical_device(90);
  ForwardParams params = call(2, 1, 32, 8, 128, 4096);
  params.dropout_p = 0.1;
  EXPECT_FALSE(plan_decode(params, device));
}

TEST(DecodePlan, TilesHoldTheRowsOfAGroup) {
  const DeviceProperties device = typical_device(90);
  const struct {
    int64_t seqlen_q, group;
    int tile_m;
  } cases[] = {{1, 1, 16}, {1, 16, 16}, {17, 1, 32}, {4, 8, 32}, {1, 33, 64}, {8, 8, 64}};
  for (const auto& c : cases) {
    const auto plan = plan_decode(call(1, c.seqlen_q, 2 * c.group, 2, 128, 4096), device);
    ASSERT_TRUE(plan);
    EXPECT_EQ(plan->spec.tile_m, c.tile_m);
    EXPECT_EQ(plan->args.num_row_tiles, 1u);
    EXPECT_EQ(plan->args.num_rows, 2 * c.seqlen_q * c.group);
  }
}

TEST(DecodePlan, AccessFollowsAlignment) {
  const DeviceProperties device = typical_device(90);
  EXPECT_EQ(plan_decode(call(1, 1, 8, 8, 128, 64), device)->spec.access, Access::kWhole);
  EXPECT_EQ(plan_decode(call(1, 1, 8, 8, 72, 64), device)->spec.access, Access::kPadded);
  EXPECT_EQ(plan_decode(call(1, 1, 8, 8, 72, 64), device)->spec.head_dim, 80);
  EXPECT_EQ(plan_decode(call(1, 1, 8, 8, 33, 64), device)->spec.access, Access::kElement);
  ForwardParams unaligned = call(1, 1, 8, 8, 128, 64);
  unaligned.v.data = reinterpret_cast<void*>(2);
  EXPECT_EQ(plan_decode(unaligned, device)->spec.access, Access::kElement);
}

TEST(DecodePlan, SplitsFillTheMachineOnce) {
  const DeviceProperties device = typical_device(90);
  for (const int64_t batch : {1, 4, 16, 32}) {
    const auto plan = plan_decode(call(batch, 1, 32, 8, 128, 65536), device);
    ASSERT_TRUE(plan);
    const int64_t units = int64_t{device.num_multiprocessors} * plan->spec.min_blocks;
    EXPECT_LE(plan->shape.blocks, units);
    EXPECT_GT(plan->shape.blocks * 10, units * 8);
  }
  // Enough sequences fill it without.
  EXPECT_EQ(plan_decode(call(64, 1, 32, 8, 128, 8192), device)->args.num_splits, 1u);
  EXPECT_EQ(plan_decode(call(1, 1, 32, 8, 128, 60), device)->args.num_splits, 1u);
}

TEST(DecodePlan, BoundsWhatOneLongSequenceCosts) {
  const DeviceProperties device = typical_device(90);
  // Two waves of blocks without a split.
  ForwardParams params = call(66, 1, 32, 8, 128, 131072);
  EXPECT_EQ(plan_decode(params, device)->args.num_splits, 1u);
  const int32_t lengths[66] = {};
  params.seqused_k = lengths;
  EXPECT_EQ(plan_decode(params, device)->args.num_splits, 8u);
}

TEST(DecodePlan, TakesTheNumberOfSplitsThatIsGiven) {
  const DeviceProperties device = typical_device(90);
  for (const int splits : {1, 3, 128, 1000}) {
    ForwardParams params = call(1, 1, 32, 8, 128, 65536);
    params.num_splits = splits;
    const auto plan = plan_decode(params, device);
    ASSERT_TRUE(plan);
    EXPECT_EQ(plan->args.num_splits, static_cast<uint32_t>(std::min(splits, kMaxSplits)));
    EXPECT_EQ(plan->shape.blocks, 8 * int64_t{plan->args.num_splits});
    EXPECT_EQ(plan->combine_shape.blocks, splits == 1 ? 0 : 32);
  }
}

TEST(DecodePlan, WorkspaceHoldsTheParts) {
  const DeviceProperties device = typical_device(90);
  ForwardParams params = call(3, 2, 32, 8, 100, 65536);
  params.num_splits = 7;
  auto plan = plan_decode(params, device);
  ASSERT_TRUE(plan);
  const int64_t parts = 7 * 3 * 2 * 32;
  EXPECT_GE(plan->workspace_bytes, static_cast<size_t>(parts * (plan->spec.head_dim + 2) * 4));
  alignas(256) static char memory[256];
  plan->set_workspace(memory);
  EXPECT_EQ(static_cast<void*>(plan->args.partial_out), memory);
  const char* rows = reinterpret_cast<const char*>(plan->args.partial_rows);
  EXPECT_GE(rows - memory, parts * plan->spec.head_dim * 4);
  EXPECT_LE(static_cast<size_t>(rows - memory) + static_cast<size_t>(parts) * sizeof(PartialRow),
            plan->workspace_bytes);
  params.num_splits = 1;
  EXPECT_EQ(plan_decode(params, device)->workspace_bytes, 0u);
}

TEST(DecodePlan, WithoutPagesThereAreNoKeys) {
  ForwardParams params = call(1, 1, 8, 8, 128, 640);
  const int32_t table[10] = {};
  params.block_table = table;
  params.page_size = 64;
  const auto plan = plan_decode(params, typical_device(90));
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->args.params.seqlen_k, 0);
}

TEST(DecodePlan, LeavesWhatIsTooLargeForItsNumbers) {
  const DeviceProperties device = typical_device(90);
  EXPECT_FALSE(plan_decode(call(1, 1, 1, 1, 8, int64_t{1} << 31), device));
  EXPECT_FALSE(plan_decode(call(int64_t{1} << 26, 1, 32, 32, 8, 16), device));
}

TEST(DecodePlan, EverySpecFitsEveryArchitecture) {
  for (const int arch : known_architectures()) {
    const DeviceProperties device = typical_device(arch);
    std::set<std::string> names;
    for (const DecodeSpec& spec : all_decode_specs(device)) {
      EXPECT_TRUE(names.insert(to_text(spec)).second) << to_text(spec);
      EXPECT_LE(spec.shared_bytes(), device.max_shared_per_block) << to_text(spec) << arch;
      EXPECT_LE(spec.min_blocks * (spec.shared_bytes() + 1024), device.shared_per_multiprocessor)
          << to_text(spec) << arch;
      EXPECT_GE(spec.stages, 2);
      EXPECT_LE(spec.threads(), 128);
      EXPECT_EQ(spec.tile_bytes() % 128, 0);
    }
  }
}

TEST(DecodePlan, ChoosesAmongTheEnumeratedSpecs) {
  for (const int arch : known_architectures()) {
    const DeviceProperties device = typical_device(arch);
    const std::vector<DecodeSpec> specs = all_decode_specs(device);
    const std::vector<CombineSpec> combine_specs = all_combine_specs(device);
    for (const int64_t head_dim : {1, 33, 40, 64, 72, 128, 200, 256}) {
      for (const int64_t rows : {1, 20, 60}) {
        for (const bool softcap : {false, true}) {
          ForwardParams params = call(1, rows, 4, 4, head_dim, 5000);
          params.softcap = softcap ? 30.0f : 0.0f;
          const auto plan = plan_decode(params, device);
          ASSERT_TRUE(plan);
          EXPECT_NE(std::find(specs.begin(), specs.end(), plan->spec), specs.end());
          EXPECT_NE(std::find(combine_specs.begin(), combine_specs.end(), plan->combine_spec),
                    combine_specs.end());
        }
      }
    }
  }
}

}  // namespace
}  // namespace flash_attn_plus::cuda
