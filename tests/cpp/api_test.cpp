// The C ABI through its C++ header: results against the definition, and what it refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "flash_attn_plus/attention.hpp"

namespace flash_attn_plus {
namespace {

std::vector<float> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// Two sequences of 5 queries and 7 keys, 4 query heads over 2 key heads, head dimension 12.
class ApiTest : public testing::Test {
 protected:
  static constexpr int64_t kBatch = 2, kSeqlenQ = 5, kSeqlenK = 7, kHeads = 4, kHeadsK = 2,
                           kDim = 12;

  ApiTest() {
    args_.q = q_;
    args_.k = k_;
    args_.v = v_;
    args_.out = out_;
    args_.softmax_lse = lse_;
    args_.softmax_scale = 0.5;
  }

  // Expects a refusal with this text that leaves the outputs as they were.
  void expect_refused(const std::string& text, fap_status status = FAP_ERROR) {
    const std::vector<float> before = out_data_;
    EXPECT_EQ(fap_forward(&args_), status);
    EXPECT_NE(std::string(fap_last_error()).find(text), std::string::npos) << fap_last_error();
    EXPECT_EQ(fap_forward_supports(&args_), status);
    EXPECT_EQ(before, out_data_);
  }

  std::vector<float> q_data_ = random_values(kBatch * kSeqlenQ * kHeads * kDim, 1);
  std::vector<float> k_data_ = random_values(kBatch * kSeqlenK * kHeadsK * kDim, 2);
  std::vector<float> v_data_ = random_values(kBatch * kSeqlenK * kHeadsK * kDim, 3);
  std::vector<float> out_data_ = std::vector<float>(q_data_.size(), -7.0f);
  std::vector<float> lse_data_ = std::vector<float>(kBatch * kHeads * kSeqlenQ);
  Tensor q_{q_data_.data(), kFloat32Type, {kBatch, kSeqlenQ, kHeads, kDim}};
  Tensor k_{k_data_.data(), kFloat32Type, {kBatch, kSeqlenK, kHeadsK, kDim}};
  Tensor v_{v_data_.data(), kFloat32Type, {kBatch, kSeqlenK, kHeadsK, kDim}};
  Tensor out_{out_data_.data(), kFloat32Type, {kBatch, kSeqlenQ, kHeads, kDim}};
  Tensor lse_{lse_data_.data(), kFloat32Type, {kBatch, kHeads, kSeqlenQ}};
  fap_forward_args args_ = make_args<fap_forward_args>();
};

TEST_F(ApiTest, ForwardIsTheDefinition) {
  args_.causal = 1;
  forward(args_);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < kSeqlenQ; ++i) {
        std::vector<double> weights;
        const float* q = &q_data_[((b * kSeqlenQ + i) * kHeads + h) * kDim];
        double sum = 0;
        for (int64_t j = 0; j <= i + kSeqlenK - kSeqlenQ; ++j) {
          const float* k = &k_data_[((b * kSeqlenK + j) * kHeadsK + h / 2) * kDim];
          double score = 0;
          for (int64_t d = 0; d < kDim; ++d) score += double{q[d]} * k[d];
          weights.push_back(std::exp(0.5 * score));
          sum += weights.back();
        }
        EXPECT_NEAR(lse_data_[(b * kHeads + h) * kSeqlenQ + i], std::log(sum), 1e-5);
        for (int64_t d = 0; d < kDim; ++d) {
          double expected = 0;
          for (size_t j = 0; j < weights.size(); ++j) {
            const size_t row = (b * kSeqlenK + static_cast<int64_t>(j)) * kHeadsK + h / 2;
            expected += weights[j] / sum * v_data_[row * kDim + d];
          }
          EXPECT_NEAR(out_data_[((b * kSeqlenQ + i) * kHeads + h) * kDim + d], expected, 1e-5);
        }
      }
    }
  }
}

TEST_F(ApiTest, StridesAreFollowed) {
  forward(args_);
  const std::vector<float> expected = out_data_;
  // The same numbers as (b, h, s, d) in memory.
  std::vector<float> transposed(q_data_.size());
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t i = 0; i < kSeqlenQ; ++i) {
      for (int64_t h = 0; h < kHeads; ++h) {
        std::memcpy(&transposed[((b * kHeads + h) * kSeqlenQ + i) * kDim],
                    &q_data_[((b * kSeqlenQ + i) * kHeads + h) * kDim], kDim * sizeof(float));
      }
    }
  }
  const Tensor q(transposed.data(), kFloat32Type, {kBatch, kSeqlenQ, kHeads, kDim},
                 {kHeads * kSeqlenQ * kDim, kDim, kSeqlenQ * kDim, 1});
  args_.q = q;
  forward(args_);
  EXPECT_EQ(out_data_, expected);
}

TEST_F(ApiTest, RefusesStructsOfAnotherVersion) {
  args_.size -= 8;
  expect_refused("size must be");
  EXPECT_EQ(fap_forward(nullptr), FAP_ERROR);
}

TEST_F(ApiTest, RefusesMissingTensors) {
  args_.v = nullptr;
  expect_refused("v must be given");
}

TEST_F(ApiTest, RefusesOtherDevices) {
  const Tensor elsewhere(q_data_.data(), kFloat32Type, {kBatch, kSeqlenQ, kHeads, kDim}, {},
                         {8, 0});
  args_.q = elsewhere;
  expect_refused("q must be on the CPU or on an NVIDIA GPU");
  args_.q = q_;
  const Tensor v(v_data_.data(), kFloat32Type, {kBatch, kSeqlenK, kHeadsK, kDim}, {}, {2, 0});
  args_.v = v;
  expect_refused("v must be on the same device as q");
}

// The checks alone are for backends of any device.
TEST_F(ApiTest, ChecksCallsOfOtherDevices) {
  EXPECT_EQ(fap_forward_check(&args_), FAP_OK) << fap_last_error();
  std::vector<uint16_t> halves(kBatch * kSeqlenK * kHeads * kDim);
  const fap_dtype half = {2, 16, 1};
  const fap_device device = {14, 1};
  const Tensor q(halves.data(), half, {kBatch, kSeqlenQ, kHeads, kDim}, {}, device);
  const Tensor k(halves.data(), half, {kBatch, kSeqlenK, kHeadsK, kDim}, {}, device);
  std::vector<uint16_t> out_data(halves.size());
  const Tensor out(out_data.data(), half, {kBatch, kSeqlenQ, kHeads, kDim}, {}, device);
  args_.q = q;
  args_.k = args_.v = k;
  args_.out = out;
  args_.softmax_lse = nullptr;
  EXPECT_EQ(fap_forward_check(&args_), FAP_OK) << fap_last_error();
  expect_refused("q must be on the CPU or on an NVIDIA GPU");
  args_.softcap = -1;
  EXPECT_EQ(fap_forward_check(&args_), FAP_ERROR);
  EXPECT_NE(std::string(fap_last_error()).find("softcap must be finite"), std::string::npos);
}

TEST_F(ApiTest, RefusesBrokenConstraintsWithTheirOwnStatus) {
  const Tensor k(k_data_.data(), kFloat32Type, {kBatch, kSeqlenK, 3, 4});
  args_.k = k;
  expect_refused("Number of heads in key/value must divide number of heads in query",
                 FAP_CONSTRAINT_ERROR);
}

TEST_F(ApiTest, RefusesOutputsThatAreInputsOrOverlapThemselves) {
  args_.out = q_;
  expect_refused("out must not be the same memory as q");
  const Tensor expanded(out_data_.data(), kFloat32Type, {kBatch, kSeqlenQ, kHeads, kDim},
                        {0, kHeads * kDim, kDim, 1});
  args_.out = expanded;
  expect_refused("out is written to, but is expanded");
}

TEST_F(ApiTest, RefusesNumbersThatMeanNothing) {
  for (const double p : {1.0, -0.1, std::nan("")}) {
    args_.dropout_p = p;
    expect_refused("dropout_p must be in [0, 1)");
  }
  args_.dropout_p = 0.5;
  expect_refused("rng_state must be given when dropout_p > 0");
  args_.dropout_p = 0;
  args_.softcap = -1;
  expect_refused("softcap must be finite and not negative");
  args_.softcap = 0;
  args_.softmax_scale = std::nan("");
  expect_refused("softmax_scale must be finite");
}

TEST_F(ApiTest, WindowsOfAnySizeAreTaken) {
  forward(args_);
  const std::vector<float> expected = out_data_;
  args_.window_left = args_.window_right = INT64_MAX;
  forward(args_);
  EXPECT_EQ(out_data_, expected);
  args_.window_left = args_.window_right = INT64_MIN;
  forward(args_);
  EXPECT_EQ(out_data_, expected);
}

TEST_F(ApiTest, BackwardIsTheDerivative) {
  forward(args_);
  const std::vector<float> out = out_data_;
  std::vector<float> dout = random_values(q_data_.size(), 4), dq(q_data_.size());
  std::vector<float> dk(k_data_.size()), dv(v_data_.size()), softmax_d(lse_data_.size());
  const std::vector<int64_t> q_shape{kBatch, kSeqlenQ, kHeads, kDim};
  const std::vector<int64_t> k_shape{kBatch, kSeqlenK, kHeadsK, kDim};
  const Tensor dout_t(dout.data(), kFloat32Type, q_shape), dq_t(dq.data(), kFloat32Type, q_shape);
  const Tensor dk_t(dk.data(), kFloat32Type, k_shape), dv_t(dv.data(), kFloat32Type, k_shape);
  const Tensor softmax_d_t(softmax_d.data(), kFloat32Type, {kBatch, kHeads, kSeqlenQ});
  fap_backward_args args = make_args<fap_backward_args>();
  args.softmax_scale = 0.5;
  args.dout = dout_t;
  args.q = q_;
  args.k = k_;
  args.v = v_;
  args.out = out_;
  args.softmax_lse = lse_;
  args.dq = dq_t;
  args.dk = dk_t;
  args.dv = dv_t;
  args.softmax_d = softmax_d_t;
  backward(args);

  const auto loss = [&] {
    forward(args_);
    double sum = 0;
    for (size_t i = 0; i < dout.size(); ++i) sum += double{dout[i]} * out_data_[i];
    return sum;
  };
  const auto expect_derivative = [&](std::vector<float>& values, const std::vector<float>& gradient,
                                     const char* name) {
    for (size_t i = 0; i < values.size(); i += 11) {
      const float value = values[i];
      constexpr float kStep = 1e-2f;
      values[i] = value + kStep;
      const double above = loss();
      values[i] = value - kStep;
      const double below = loss();
      values[i] = value;
      EXPECT_NEAR(gradient[i], (above - below) / (2 * kStep), 2e-3) << name << "[" << i << "]";
    }
  };
  expect_derivative(q_data_, dq, "dq");
  expect_derivative(k_data_, dk, "dk");
  expect_derivative(v_data_, dv, "dv");
}

TEST(CpuIsaTest, TheSelectedOneCanRun) {
  const char* selected = fap_cpu_isa();
  ASSERT_NE(selected, nullptr);
  EXPECT_NE(std::string(fap_cpu_isas()).find(selected), std::string::npos);
}

}  // namespace
}  // namespace flash_attn_plus
