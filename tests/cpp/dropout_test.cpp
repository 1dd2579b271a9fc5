// The dropout function: published Philox values, the rate, and what it depends on.
#include "attention/dropout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace flash_attn_plus {
namespace {

// Known answers of Philox-4x32-7 from the Random123 distribution (kat_vectors).
TEST(PhiloxTest, MatchesPublishedKnownAnswers) {
  EXPECT_EQ(philox({{0, 0, 0, 0}}, {{0, 0}}),
            (PhiloxBlock{{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}}));
  EXPECT_EQ(philox({{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}}, {{0xffffffff, 0xffffffff}}),
            (PhiloxBlock{{0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}));
  EXPECT_EQ(philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {{0xa4093822, 0x299f31d0}}),
            (PhiloxBlock{{0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a}}));
}

TEST(DropoutTest, EveryEntryHasANumberOfItsOwn) {
  // A block serves two rows and four columns; no two entries share a block and a place in it.
  std::set<std::tuple<uint32_t, uint32_t, int64_t, int64_t>> places;
  for (int64_t row = 0; row < 64; ++row) {
    for (int64_t column = 0; column < 128; ++column) {
      places.insert({dropout_row_counter(row), dropout_column_counter(column), (row >> 3) & 1,
                     (column >> 3) & 3});
    }
  }
  EXPECT_EQ(places.size(), 64u * 128u);
}

TEST(DropoutTest, RateIsKeptWithinTheDeviationOfItsSample) {
  for (const double p : {0.1, 0.17, 0.5, 0.9}) {
    const Dropout dropout = make_dropout(p, 42, 7);
    int64_t kept = 0;
    constexpr int64_t kRows = 256, kColumns = 512;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kColumns; ++j) kept += dropout_keeps(dropout, 1, 2, i, j);
    }
    const double deviation = std::sqrt(p * (1 - p) / (kRows * kColumns));
    EXPECT_NEAR(static_cast<double>(kept) / (kRows * kColumns), 1 - p, 4.5 * deviation) << p;
    EXPECT_NEAR(dropout.threshold / 65536.0, 1 - p, 1.0 / 65536);
    EXPECT_FLOAT_EQ(dropout.scale, static_cast<float>(1 / (1 - p)));
  }
}

TEST(DropoutTest, EveryArgumentMatters) {
  const Dropout base = make_dropout(0.5, 1, 2);
  const auto differs = [&](const Dropout& other, int64_t batch, int64_t head, int64_t row,
                           int64_t column) {
    int different = 0;
    for (int64_t i = 0; i < 32; ++i) {
      for (int64_t j = 0; j < 32; ++j) {
        different += dropout_keeps(base, 0, 0, i, j) !=
                     dropout_keeps(other, batch, head, i + row, j + column);
      }
    }
    return different > 300;  // of 1024, half in the mean
  };
  EXPECT_FALSE(differs(base, 0, 0, 0, 0));
  EXPECT_TRUE(differs(base, 1, 0, 0, 0));
  EXPECT_TRUE(differs(base, 0, 1, 0, 0));
  EXPECT_TRUE(differs(base, 0, 0, 32, 0));
  EXPECT_TRUE(differs(base, 0, 0, 0, 32));
  EXPECT_TRUE(differs(make_dropout(0.5, 2, 2), 0, 0, 0, 0));
  EXPECT_TRUE(differs(make_dropout(0.5, 1, 3), 0, 0, 0, 0));
  EXPECT_TRUE(differs(make_dropout(0.5, 1 + (uint64_t{1} << 32), 2), 0, 0, 0, 0));
  EXPECT_TRUE(differs(make_dropout(0.5, 1, 2 + (uint64_t{1} << 32)), 0, 0, 0, 0));
}

TEST(DropoutTest, NegligibleProbabilityIsOff) {
  EXPECT_FALSE(make_dropout(0.0, 1, 2).enabled());
  EXPECT_FALSE(make_dropout(1e-30, 1, 2).enabled());
  EXPECT_EQ(make_dropout(1e-30, 1, 2).scale, 1.0f);
  EXPECT_TRUE(make_dropout(1e-3, 1, 2).enabled());
}

}  // namespace
}  // namespace flash_attn_plus
