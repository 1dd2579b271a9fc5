// The CPU kernels' shared layer on every instruction set that this processor can run.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cpu/cpu.h"
#include "cpu_vector_checks.h"

namespace flash_attn_plus::cpu {

#define FAP_DECLARE(isa)                              \
  namespace isa {                                     \
  CpuVectorChecks run_checks(const Dropout& dropout); \
  }
FAP_DECLARE(test_portable)
#if defined(__x86_64__)
FAP_DECLARE(test_avx2)
FAP_DECLARE(test_avx512)
FAP_DECLARE(test_avx512_bf16)
FAP_DECLARE(test_amx_bf16)
#endif
#undef FAP_DECLARE

namespace {

struct Case {
  const char* isa;
  CpuVectorChecks (*run_checks)(const Dropout& dropout);
};

const Case kCases[] = {
    {"portable", &test_portable::run_checks},
#if defined(__x86_64__)
    {"avx2", &test_avx2::run_checks},
    {"avx512", &test_avx512::run_checks},
    {"avx512_bf16", &test_avx512_bf16::run_checks},
    {"amx_bf16", &test_amx_bf16::run_checks},
#endif
};

class CpuVector : public testing::TestWithParam<Case> {};

TEST_P(CpuVector, IsExactWhereItSaysSo) {
  const auto& runnable = runnable_isas();
  if (std::find(runnable.begin(), runnable.end(), GetParam().isa) == runnable.end()) {
    GTEST_SKIP() << "this processor cannot run " << GetParam().isa;
  }
  const CpuVectorChecks checks = GetParam().run_checks(make_dropout(0.3, 1234, 5678));
  EXPECT_LT(checks.exp_error, 2.0);
  EXPECT_LT(checks.exp2_error, 2.0);
  EXPECT_LT(checks.tanh_error, 2.0);
  EXPECT_LT(checks.log_error, 2.0);
  EXPECT_EQ(checks.special_value_errors, 0);
  EXPECT_EQ(checks.conversion_errors, 0);
  EXPECT_EQ(checks.dropout_errors, 0);
  EXPECT_EQ(checks.finiteness_errors, 0);
  EXPECT_LT(checks.gemm_error, 4.0);
  EXPECT_LT(checks.transposed_gemm_error, 4.0);
  for (int packing = 0; packing < 2; ++packing) {
    EXPECT_LT(checks.bf16_gemm_error[0][packing], 1e-5);
    // Two parts: the products of two lower parts are left out, 2^-18 each at most.
    EXPECT_LT(checks.bf16_gemm_error[1][packing], 2 * 40 * 0x1p-18);
    EXPECT_LT(checks.bf16_gemm_error[2][packing], 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(All, CpuVector, testing::ValuesIn(kCases),
                         [](const auto& info) { return std::string(info.param.isa); });

}  // namespace
}  // namespace flash_attn_plus::cpu
