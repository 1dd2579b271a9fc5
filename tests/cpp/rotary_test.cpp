// Rotary embedding and appending to a cache, against the same in double.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu.h"

namespace flash_attn_plus {
namespace {

struct Case {
  int64_t head_dim;
  int64_t rotary_dim;
  bool interleaved;
  bool conjugate;
};

std::string name_of(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return "d" + std::to_string(c.head_dim) + "_r" + std::to_string(c.rotary_dim) +
         (c.interleaved ? "_interleaved" : "_halves") + (c.conjugate ? "_conjugate" : "");
}

std::vector<float> random_numbers(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> numbers(static_cast<size_t>(count));
  for (float& x : numbers) x = uniform(random);
  return numbers;
}

// One row of one head; the angle's cosine and sine are rotary_dim / 2 numbers each.
std::vector<double> rotated(const float* x, const float* cos, const float* sin, const Case& c) {
  std::vector<double> out(x, x + c.head_dim);
  const int64_t half = c.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = c.interleaved ? 2 * i : i;
    const int64_t second = c.interleaved ? 2 * i + 1 : i + half;
    const double s = c.conjugate ? -double{sin[i]} : double{sin[i]};
    out[first] = x[first] * double{cos[i]} - x[second] * s;
    out[second] = x[first] * s + x[second] * double{cos[i]};
  }
  return out;
}

// Two products of numbers up to 1 and their sum, each rounded to float32.
constexpr double kTolerance = 3 * 0x1p-24 * 2;

class Rotary : public testing::TestWithParam<Case> {
 protected:
  static constexpr int64_t kBatch = 3, kSeqlen = 7, kHeads = 2, kPositions = 20;

  RotaryParams params() const {
    const Case& c = GetParam();
    RotaryParams params;
    params.batch = kBatch;
    params.seqlen = kSeqlen;
    params.num_heads = kHeads;
    params.head_dim = c.head_dim;
    params.cos = cos_.data();
    params.sin = sin_.data();
    params.cos_stride = params.sin_stride = c.rotary_dim / 2;
    params.num_positions = kPositions;
    params.rotary_dim = c.rotary_dim;
    params.interleaved = c.interleaved;
    params.conjugate = c.conjugate;
    params.num_threads = 2;
    return params;
  }

  Operand operand(std::vector<float>& x, bool variable_length = false) const {
    const int64_t row = kHeads * GetParam().head_dim;
    return {x.data(), variable_length ? 0 : kSeqlen * row, row, GetParam().head_dim};
  }

  void expect_row(const float* out, const float* x, int64_t position) const {
    const Case& c = GetParam();
    const int64_t half = c.rotary_dim / 2;
    const std::vector<double> expected =
        rotated(x, cos_.data() + position * half, sin_.data() + position * half, c);
    for (int64_t i = 0; i < c.head_dim; ++i) {
      if (i < c.rotary_dim) {
        EXPECT_NEAR(out[i], expected[i], kTolerance) << "element " << i;
      } else {
        EXPECT_EQ(out[i], x[i]) << "element " << i;
      }
    }
  }

  const std::vector<float> cos_ = random_numbers(kPositions * GetParam().rotary_dim / 2, 1);
  const std::vector<float> sin_ = random_numbers(kPositions * GetParam().rotary_dim / 2, 2);
  const int64_t row_size_ = kHeads * GetParam().head_dim;
  const std::vector<float> x_ = random_numbers(kBatch * kSeqlen * row_size_, 3);
};

TEST_P(Rotary, OfABatchWithOffsets) {
  const std::vector<int32_t> offsets = {0, 13, 5};
  std::vector<float> x = x_, out(x_.size(), -7.0f);
  RotaryParams params = this->params();
  params.x = operand(x);
  params.out = operand(out);
  params.seqlen_offsets32 = offsets.data();
  cpu::rotary(params);
  for (int64_t i = 0; i < kBatch * kSeqlen * kHeads; ++i) {
    const int64_t row = i / kHeads;
    const int64_t first = i * GetParam().head_dim;
    expect_row(&out[first], &x_[first], offsets[row / kSeqlen] + row % kSeqlen);
  }
}

TEST_P(Rotary, InPlaceGivesTheSameBits) {
  std::vector<float> x = x_, out(x_.size());
  RotaryParams params = this->params();
  params.x = operand(x);
  params.out = operand(out);
  params.seqlen_offset = 4;
  cpu::rotary(params);
  params.out = operand(x);
  cpu::rotary(params);
  EXPECT_EQ(std::memcmp(x.data(), out.data(), x.size() * sizeof(float)), 0);
}

TEST_P(Rotary, OfVariableLengths) {
  const std::vector<int32_t> cu_seqlens = {0, 5, 5, 12};
  const std::vector<int64_t> offsets = {2, 0, 13};
  const int64_t total = 15;  // the last three rows belong to no sequence
  std::vector<float> x = x_, out(x_.size(), -7.0f);
  RotaryParams params = this->params();
  params.x = operand(x, true);
  params.out = operand(out, true);
  params.cu_seqlens = cu_seqlens.data();
  params.seqlen_offsets64 = offsets.data();
  cpu::rotary(params);
  for (int64_t batch = 0; batch < kBatch; ++batch) {
    for (int64_t row = cu_seqlens[batch]; row < cu_seqlens[batch + 1]; ++row) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const int64_t first = row * row_size_ + head * GetParam().head_dim;
        expect_row(&out[first], &x_[first], offsets[batch] + row - cu_seqlens[batch]);
      }
    }
  }
  for (int64_t i = cu_seqlens[kBatch] * row_size_; i < total * row_size_; ++i) {
    EXPECT_EQ(out[i], -7.0f);
  }
}

// A rotation followed by its conjugate gives x (cos^2 + sin^2).
TEST_P(Rotary, ConjugateUndoes) {
  if (GetParam().conjugate) return;  // the case without it does both
  std::vector<float> cos(cos_.size()), sin(sin_.size());
  for (size_t i = 0; i < cos.size(); ++i) {
    cos[i] = std::cos(3.0f * cos_[i]);
    sin[i] = std::sin(3.0f * cos_[i]);
  }
  std::vector<float> x = x_;
  RotaryParams params = this->params();
  params.x = params.out = operand(x);
  params.cos = cos.data();
  params.sin = sin.data();
  cpu::rotary(params);
  params.conjugate = true;
  cpu::rotary(params);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], x_[i], 2 * kTolerance);
}

// New keys and values go where the table says, keys rotated; everything else stays as it was.
TEST_P(Rotary, AppendsToPages) {
  const Case& c = GetParam();
  if (c.conjugate) return;  // keys in a cache are rotated forward
  constexpr int64_t kPageSize = 3, kPages = 10, kNew = 4;
  const std::vector<int32_t> table = {4, 1, 7, 0, 9, 2, 8, 3, 5};  // (3, 3)
  const std::vector<int32_t> lengths = {0, 2, 5};
  for (const bool rotates : {false, true}) {
    std::vector<float> k = random_numbers(kBatch * kNew * row_size_, 4);
    std::vector<float> v = random_numbers(kBatch * kNew * row_size_, 5);
    std::vector<float> k_cache(kPages * kPageSize * row_size_, -7.0f), v_cache = k_cache;
    std::vector<float> q = x_, q_rotated(x_.size());
    AppendParams params;
    params.batch = kBatch;
    params.num_heads = params.num_heads_k = kHeads;
    params.head_dim = c.head_dim;
    params.seqlen_q = kSeqlen;
    params.seqlen_new = kNew;
    params.q = operand(q);
    params.k = {k.data(), kNew * row_size_, row_size_, c.head_dim};
    params.v = {v.data(), kNew * row_size_, row_size_, c.head_dim};
    params.k_cache = {k_cache.data(), kPageSize * row_size_, row_size_, c.head_dim};
    params.v_cache = {v_cache.data(), kPageSize * row_size_, row_size_, c.head_dim};
    params.cache_seqlens = lengths.data();
    params.block_table = table.data();
    params.block_table_stride = 3;
    params.page_size = kPageSize;
    if (rotates) {
      params.q_rotated = operand(q_rotated);
      params.rotary_cos = cos_.data();
      params.rotary_sin = sin_.data();
      params.rotary_cos_stride = params.rotary_sin_stride = c.rotary_dim / 2;
      params.rotary_dim = c.rotary_dim;
      params.rotary_interleaved = c.interleaved;
      params.rotate_q_by_row = true;
    }
    cpu::append(params);

    std::vector<bool> written(kPages * kPageSize, false);
    for (int64_t batch = 0; batch < kBatch; ++batch) {
      for (int64_t i = 0; i < kNew; ++i) {
        const int64_t row = lengths[batch] + i;
        const int64_t place = table[batch * 3 + row / kPageSize] * kPageSize + row % kPageSize;
        written[place] = true;
        const float* new_v = &v[(batch * kNew + i) * row_size_];
        EXPECT_EQ(std::memcmp(&v_cache[place * row_size_], new_v, row_size_ * sizeof(float)), 0);
        const float* new_k = &k[(batch * kNew + i) * row_size_];
        if (!rotates) {
          EXPECT_EQ(std::memcmp(&k_cache[place * row_size_], new_k, row_size_ * sizeof(float)), 0);
          continue;
        }
        for (int64_t head = 0; head < kHeads; ++head) {
          expect_row(&k_cache[place * row_size_ + head * c.head_dim], new_k + head * c.head_dim,
                     row);
        }
      }
    }
    for (int64_t i = 0; i < kPages * kPageSize * row_size_; ++i) {
      if (written[i / row_size_]) continue;
      EXPECT_EQ(k_cache[i], -7.0f);
      EXPECT_EQ(v_cache[i], -7.0f);
    }
    if (!rotates) continue;
    for (int64_t i = 0; i < kBatch * kSeqlen * kHeads; ++i) {
      const int64_t row = i / kHeads, first = i * c.head_dim;
      expect_row(&q_rotated[first], &q[first], lengths[row / kSeqlen] + row % kSeqlen);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Rotary,
                         testing::Values(Case{64, 64, false, false}, Case{64, 64, true, false},
                                         Case{64, 64, false, true}, Case{64, 64, true, true},
                                         Case{80, 32, false, false}, Case{80, 32, true, false},
                                         Case{72, 16, false, true}, Case{40, 40, true, false},
                                         Case{40, 40, false, false}, Case{37, 10, false, false},
                                         Case{37, 10, true, false}, Case{256, 256, false, false},
                                         Case{3, 2, true, false}, Case{2, 2, false, false}),
                         name_of);

TEST(RotaryTest, RowsOfNoSequenceAreCopied) {
  constexpr int64_t kRows = 5, kDim = 16;
  const std::vector<float> x = random_numbers(kRows * kDim, 1), tables(3 * kDim / 2, 0.5f);
  std::vector<float> out(x.size(), -7.0f);
  const int32_t cu_seqlens[] = {0, 3};
  RotaryParams params;
  params.batch = 1;
  params.seqlen = 3;
  params.num_heads = 1;
  params.head_dim = params.rotary_dim = kDim;
  params.x = {const_cast<float*>(x.data()), 0, kDim, kDim};
  params.out = {out.data(), 0, kDim, kDim};
  params.cos = params.sin = tables.data();
  params.cos_stride = params.sin_stride = kDim / 2;
  params.num_positions = 3;
  params.cu_seqlens = cu_seqlens;
  params.total_rows = kRows;
  cpu::rotary(params);
  for (int64_t i = 0; i < 3 * kDim; ++i) EXPECT_NE(out[i], x[i]);
  for (int64_t i = 3 * kDim; i < kRows * kDim; ++i) EXPECT_EQ(out[i], x[i]);
}

}  // namespace
}  // namespace flash_attn_plus
