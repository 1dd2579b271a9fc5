// FlashAttention-Plus in C++: the C ABI with views that own their shapes, and exceptions.
//
//   using namespace flash_attn_plus;
//   Tensor q(q_data, kFloat32Type, {b, sq, h, d}), ...;
//   fap_forward_args args = make_args<fap_forward_args>();
//   args.q = q; ...
//   forward(args);
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {

inline constexpr fap_dtype kFloat32Type = {2, 32, 1};
inline constexpr fap_dtype kFloat16Type = {2, 16, 1};
inline constexpr fap_dtype kBFloat16Type = {4, 16, 1};
inline constexpr fap_dtype kInt32Type = {0, 32, 1};
inline constexpr fap_dtype kInt64Type = {0, 64, 1};
inline constexpr fap_device kCpuDevice = {1, 0};

// A view of memory that the caller owns. Strides are in elements; none mean row-major and compact.
class Tensor {
 public:
  Tensor(void* data, fap_dtype dtype, std::vector<int64_t> shape, std::vector<int64_t> strides = {},
         fap_device device = kCpuDevice)
      : shape_(std::move(shape)), strides_(std::move(strides)) {
    view_.data = data;
    view_.device = device;
    view_.ndim = static_cast<int32_t>(shape_.size());
    view_.dtype = dtype;
    view_.shape = shape_.data();
    view_.strides = strides_.empty() ? nullptr : strides_.data();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  operator const fap_tensor*() const { return &view_; }  // NOLINT: implicit, to fill in arguments

 private:
  std::vector<int64_t> shape_, strides_;
  fap_tensor view_ = {};
};

// An argument was refused, or the machine cannot serve the call.
class CallError : public std::runtime_error {
 public:
  CallError(fap_status status, const char* message) : std::runtime_error(message), status(status) {}
  const fap_status status;
};

// Arguments with everything off and a scale of 1.
template <typename Args>
Args make_args() {
  Args args = {};
  args.size = sizeof(Args);
  if constexpr (requires { args.softmax_scale; }) {
    args.softmax_scale = 1.0;
    args.window_left = args.window_right = -1;
  }
  return args;
}

inline void check(fap_status status) {
  if (status != FAP_OK) throw CallError(status, fap_last_error());
}

inline void forward(const fap_forward_args& args) { check(fap_forward(&args)); }
inline void backward(const fap_backward_args& args) { check(fap_backward(&args)); }
inline void kvcache(const fap_kvcache_args& args) { check(fap_kvcache(&args)); }
inline void rotary(const fap_rotary_args& args) { check(fap_rotary(&args)); }

}  // namespace flash_attn_plus
