// Every kernel that the planners can choose, on every architecture; and what a call is said to
// launch.
#include "cuda/catalog.h"

#include <set>

#include "cuda/explain.h"
#include "cuda/fixture.h"
#include "cuda/spec.h"

namespace flash_attn_plus::cuda {
namespace {

class CatalogTest : public testing::TestWithParam<int> {};

TEST_P(CatalogTest, FitsTheSharedMemoryOfItsArchitecture) {
  const DeviceProperties device = typical_device(GetParam());
  const std::vector<CatalogEntry> kernels = all_kernels(device);
  std::set<std::string> specs, entries;
  for (const CatalogEntry& kernel : kernels) {
    EXPECT_TRUE(specs.insert(kernel.source.spec).second) << "twice: " << kernel.source.spec;
    entries.insert(kernel.source.entry);
    EXPECT_EQ(excess({}, kernel.limits, device), "") << kernel.source.spec;
    EXPECT_GE(kernel.limits.registers, 32) << kernel.source.spec;
  }
  EXPECT_GE(entries.size(), 9u);
}

TEST_P(CatalogTest, HoldsWhatCallsLaunch) {
  std::set<std::string> specs;
  for (const CatalogEntry& kernel : all_kernels(typical_device(GetParam()))) {
    specs.insert(kernel.source.spec);
  }
  for (const int64_t head_dim : {1, 24, 40, 64, 96, 128, 200, 256}) {
    for (const int64_t seqlen_q : {1, 16, 700}) {
      for (int options = 0; options < 96; ++options) {
        fap_cuda_explain_args call = {};
        call.arch = GetParam();
        call.operation = options % 3;
        call.bfloat16 = 1;
        call.batch = 2;
        call.seqlen_q = seqlen_q;
        call.seqlen_k = 900;
        call.num_heads = 4;
        call.num_heads_k = 2;
        call.head_dim = head_dim;
        call.window_left = options / 3 % 2 ? 100 : -1;
        call.window_right = -1;
        call.causal = options / 6 % 2;
        call.softcap = options / 12 % 2 ? 30.0 : 0.0;
        call.alibi = options / 24 % 2;
        call.dropout_p = options / 48 % 2 && call.operation != 2 ? 0.1 : 0.0;
        call.page_size = call.operation == 2 ? 16 : 0;
        call.seqlen_new = call.operation == 2 ? 3 : 0;
        const std::string text = explain(call);
        for (size_t at = 0; (at = text.find("Spec{", at)) != std::string::npos; ++at) {
          const size_t begin = text.rfind('\n', at) + 1;
          const std::string spec = text.substr(begin, text.find('\n', at) - begin);
          EXPECT_TRUE(specs.contains(spec)) << spec << " for options " << options;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, CatalogTest, testing::ValuesIn(known_architectures()),
                         [](const auto& info) { return "sm_" + std::to_string(info.param); });

TEST(KernelUseTest, IsReadFromTheLog) {
  const KernelUse use = use_of(
      "ptxas info    : 548 bytes gmem\n"
      "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"
      "ptxas info    : Function properties for f\n"
      "ptxas         .     16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 1 barriers, 1040 bytes smem, 4 bytes cmem[2]\n");
  EXPECT_EQ(use.registers, 168);
  EXPECT_EQ(use.stack_bytes, 16);
  EXPECT_EQ(use.spill_bytes, 24);
  EXPECT_EQ(use.shared_bytes, 1040);
  const DeviceProperties device = typical_device(90);
  EXPECT_EQ(excess(use, {.registers = 168, .stack_bytes = 16, .spill_bytes = 24}, device), "");
  EXPECT_EQ(excess(use, {.registers = 128}, device),
            "registers 168 > 128, stack bytes 16 > 0, spilled bytes 24 > 0");
  EXPECT_EQ(excess({}, {.shared_bytes = 300000}, device), "shared bytes 300000 > 232448");
}

TEST(ExplainTest, NamesTheDeviceTheWorkspaceAndTheLaunches) {
  fap_cuda_explain_args call = {};
  call.arch = 90;
  call.operation = 1;
  call.batch = 1;
  call.seqlen_q = call.seqlen_k = 512;
  call.num_heads = call.num_heads_k = 4;
  call.head_dim = 64;
  call.window_left = call.window_right = -1;
  const std::string text = explain(call);
  for (const char* part : {"sm_90: 132 multiprocessors, 227 kB", "workspace: ", "BackwardSpec{",
                           ".dtype = DType::kFloat16", "blocks of"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
  call.head_dim = 300;
  EXPECT_NE(error_of([&] { explain(call); }).find("head dimension at most 256"), std::string::npos);
  call.operation = 3;
  EXPECT_NE(error_of([&] { explain(call); }), "");
  call.arch = 75;
  EXPECT_NE(error_of([&] { explain(call); }).find("but is sm_75"), std::string::npos);
}

}  // namespace
}  // namespace flash_attn_plus::cuda
