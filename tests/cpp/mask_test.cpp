// Mask geometry against the definition, entry by entry.
#include "attention/mask.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <tuple>

namespace flash_attn_plus {
namespace {

bool visible(const Mask& mask, int64_t i, int64_t j) {
  const int64_t diagonal = i + mask.seqlen_k - mask.seqlen_q;
  return (mask.window_left < 0 || j >= diagonal - mask.window_left) &&
         (mask.window_right < 0 || j <= diagonal + mask.window_right);
}

class MaskTest : public testing::TestWithParam<std::tuple<int, int, int, int>> {
 protected:
  Mask mask() const {
    const auto [seqlen_q, seqlen_k, left, right] = GetParam();
    return {seqlen_q, seqlen_k, left, right};
  }
};

TEST_P(MaskTest, VisibleKeysOfARowAreTheDefinition) {
  const Mask m = mask();
  for (int64_t i = 0; i < m.seqlen_q; ++i) {
    const Range keys = m.visible_keys(i);
    for (int64_t j = 0; j < m.seqlen_k; ++j) {
      EXPECT_EQ(j >= keys.begin && j < keys.end, visible(m, i, j)) << i << ", " << j;
    }
  }
}

TEST_P(MaskTest, KeyRangesOfABlockAreUnionAndIntersection) {
  const Mask m = mask();
  for (int64_t begin = 0; begin < m.seqlen_q; ++begin) {
    for (int64_t end = begin + 1; end <= m.seqlen_q; ++end) {
      const Range any = m.any_visible_keys({begin, end}), all = m.all_visible_keys({begin, end});
      for (int64_t j = 0; j < m.seqlen_k; ++j) {
        bool some = false, every = true;
        for (int64_t i = begin; i < end; ++i) {
          some = some || visible(m, i, j);
          every = every && visible(m, i, j);
        }
        // The union of the rows' ranges may have no holes to be skipped, so `any` may be larger
        // than needed, never smaller; `all` is exact.
        if (some) {
          EXPECT_TRUE(j >= any.begin && j < any.end) << begin << ", " << end << ", " << j;
        }
        EXPECT_EQ(j >= all.begin && j < all.end, every) << begin << ", " << end << ", " << j;
      }
    }
  }
}

TEST_P(MaskTest, QueriesOfAKeyBlockAreThoseThatSeeSomeOrAllOfIt) {
  const Mask m = mask();
  for (int64_t begin = 0; begin < m.seqlen_k; ++begin) {
    for (int64_t end = begin + 1; end <= m.seqlen_k; ++end) {
      const Range any = m.any_seeing_queries({begin, end}),
                  all = m.all_seeing_queries({begin, end});
      for (int64_t i = 0; i < m.seqlen_q; ++i) {
        bool some = false, every = true;
        for (int64_t j = begin; j < end; ++j) {
          some = some || visible(m, i, j);
          every = every && visible(m, i, j);
        }
        EXPECT_EQ(i >= any.begin && i < any.end, some) << begin << ", " << end << ", " << i;
        EXPECT_EQ(i >= all.begin && i < all.end, every) << begin << ", " << end << ", " << i;
      }
    }
  }
}

TEST_P(MaskTest, RangesStayInsideTheSequence) {
  const Mask m = mask();
  for (int64_t i = 0; i < m.seqlen_q; ++i) {
    const Range keys = m.visible_keys(i);
    EXPECT_GE(keys.begin, 0);
    EXPECT_TRUE(keys.empty() || keys.end <= m.seqlen_k);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, MaskTest,
                         testing::Combine(testing::Values(1, 5, 12), testing::Values(0, 1, 5, 12),
                                          testing::Values(-1, 0, 3, 20),
                                          testing::Values(-1, 0, 2, 20)),
                         [](const auto& info) {
                           std::ostringstream name;
                           const auto add = [&](const char* what, int value) {
                             name << what;
                             value < 0 ? name << "inf" : name << value;
                           };
                           add("q", std::get<0>(info.param));
                           add("_k", std::get<1>(info.param));
                           add("_left_", std::get<2>(info.param));
                           add("_right_", std::get<3>(info.param));
                           return name.str();
                         });

}  // namespace
}  // namespace flash_attn_plus
