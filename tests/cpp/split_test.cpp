// The plan of splits and the merging of their results.
#include "attention/split.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace flash_attn_plus {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(SplitRange, PartsTileTheKeysInOrder) {
  for (const Range keys : {Range{0, 0}, Range{0, 1}, Range{5, 70}, Range{0, 8192}, Range{100, 8291},
                           Range{7, 3}, Range{int64_t{1} << 40, (int64_t{1} << 40) + 1000}}) {
    for (const int splits : {1, 2, 3, 7, 64, 128, 1000}) {
      int64_t next = keys.begin;
      for (int split = 0; split < splits; ++split) {
        const Range part = split_range(keys, splits, split);
        if (part.empty()) continue;
        EXPECT_EQ(part.begin, next);
        EXPECT_EQ((part.begin - keys.begin) % kSplitGranule, 0);
        next = part.end;
      }
      EXPECT_EQ(next, std::max(keys.begin, keys.end));
    }
  }
}

TEST(PlanSplits, WithoutUnitsOnlyTheKeysCount) {
  EXPECT_EQ(plan_splits(1, 0, 0), 1);
  EXPECT_EQ(plan_splits(1, 1, 0), 1);
  EXPECT_GT(plan_splits(1, 65536, 0), 16);
  EXPECT_EQ(plan_splits(1, int64_t{1} << 40, 0), kMaxSplits);
  for (const int64_t keys : {0, 1, 1000, 8192, 1 << 20}) {
    EXPECT_EQ(plan_splits(1, keys, 0), plan_splits(100000, keys, 0));
  }
}

TEST(PlanSplits, FillsTheUnitsOfADevice) {
  EXPECT_EQ(plan_splits(0, 8192, 132), plan_splits(1, 8192, 132));
  EXPECT_EQ(plan_splits(1, 0, 132), 1);
  EXPECT_EQ(plan_splits(132, 65536, 132), 1);   // full already
  EXPECT_EQ(plan_splits(1320, 65536, 132), 1);  // many waves
  EXPECT_EQ(plan_splits(64, 65536, 128), 2);
  EXPECT_GE(plan_splits(1, 65536, 132), 32);
  EXPECT_LE(plan_splits(8, 65536, 132), 132 / 8);
  EXPECT_EQ(plan_splits(1, 64, 132), 1);  // too few keys for two parts
  EXPECT_LE(plan_splits(1, int64_t{1} << 40, 1 << 20), kMaxSplits);
}

// Scores and values cut anywhere and merged give the softmax of the whole.
TEST(MergeLse, EqualsTheSoftmaxOfTheWhole) {
  std::mt19937 random(0);
  std::normal_distribution<double> normal(0.0, 20.0);
  for (const int num_parts : {1, 2, 5, 33}) {
    const int keys = 40;
    std::vector<double> scores(keys), values(keys);
    for (double& s : scores) s = static_cast<float>(normal(random));
    for (double& v : values) v = static_cast<float>(normal(random));
    double total = 0.0, expected = 0.0;
    for (int j = 0; j < keys; ++j) total += std::exp(scores[j]);
    for (int j = 0; j < keys; ++j) expected += std::exp(scores[j]) / total * values[j];

    for (const bool normalised : {false, true}) {
      std::vector<PartialSoftmax> parts(num_parts, {-kInfinity, 0.0f});
      std::vector<double> outputs(num_parts, 0.0);
      for (int part = 0; part < num_parts; ++part) {
        const int begin = keys * part / num_parts, end = keys * (part + 1) / num_parts;
        if (begin == end) continue;
        double max = -kInfinity, sum = 0.0;
        for (int j = begin; j < end; ++j) max = std::max(max, scores[j]);
        for (int j = begin; j < end; ++j) sum += std::exp(scores[j] - max);
        for (int j = begin; j < end; ++j) outputs[part] += std::exp(scores[j] - max) * values[j];
        parts[part] = {static_cast<float>(max), static_cast<float>(sum)};
        if (normalised) {
          parts[part] = {static_cast<float>(max + std::log(sum)), 1.0f};
          outputs[part] /= sum;
        }
      }
      std::vector<float> weights(num_parts);
      const float lse = merge_lse(parts.data(), num_parts, weights.data());
      // Rounding the log-sum-exps (up to about 80) to float32 is the largest error: 2^-18 relative.
      EXPECT_NEAR(lse, std::log(total), 80 * 0x1p-22);
      double out = 0.0;
      for (int part = 0; part < num_parts; ++part) out += weights[part] * outputs[part];
      EXPECT_NEAR(out, expected, 0x1p-16 * 80);
    }
  }
}

TEST(MergeLse, PartsWithoutKeysDoNotCount) {
  const PartialSoftmax parts[] = {{-kInfinity, 0.0f}, {3.0f, 2.0f}, {-kInfinity, 0.0f}};
  float weights[3];
  EXPECT_FLOAT_EQ(merge_lse(parts, 3, weights), 3.0f + std::log(2.0f));
  EXPECT_EQ(weights[0], 0.0f);
  EXPECT_FLOAT_EQ(weights[1], 0.5f);
  EXPECT_EQ(weights[2], 0.0f);
}

TEST(MergeLse, WithoutAnyKey) {
  const PartialSoftmax parts[] = {{-kInfinity, 0.0f}, {-kInfinity, 0.0f}};
  float weights[2] = {1.0f, 1.0f};
  EXPECT_EQ(merge_lse(parts, 2, weights), -kInfinity);
  EXPECT_EQ(weights[0], 0.0f);
  EXPECT_EQ(weights[1], 0.0f);
}

TEST(MergeLse, NanPropagates) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const PartialSoftmax bad : {PartialSoftmax{nan, 1.0f}, PartialSoftmax{0.0f, nan}}) {
    for (const bool first : {true, false}) {
      const PartialSoftmax good{1.0f, 1.0f};
      const PartialSoftmax parts[] = {first ? bad : good, first ? good : bad};
      float weights[2];
      EXPECT_TRUE(std::isnan(merge_lse(parts, 2, weights)));
      EXPECT_TRUE(std::isnan(weights[0]) && std::isnan(weights[1]));
    }
  }
}

}  // namespace
}  // namespace flash_attn_plus
