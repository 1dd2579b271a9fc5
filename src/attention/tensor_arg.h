// A named tensor argument and the checks that every operation makes of it. Each check throws Error
// with the name, what was expected and what was given.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "attention/params.h"
#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {

// One extent of an expected shape: its name in the message, and its size or kAny.
struct Extent {
  const char* name;
  int64_t size;
};
constexpr int64_t kAny = -1;

// DLPack's device types.
constexpr int kDeviceCpu = 1;
constexpr int kDeviceCuda = 2;

class TensorArg {
 public:
  TensorArg(const char* name, const fap_tensor* tensor) : name_(name), tensor_(tensor) {}

  explicit operator bool() const { return tensor_ != nullptr; }
  const char* name() const { return name_; }
  int ndim() const { return tensor_->ndim; }
  int64_t shape(int axis) const { return tensor_->shape[axis]; }
  int64_t stride(int axis) const;
  int64_t numel() const;
  fap_device device() const { return tensor_->device; }
  // Whether the host may read its values.
  bool on_host() const { return device().device_type == kDeviceCpu; }

  template <typename T = void>
  T* data() const {
    return tensor_->data == nullptr
               ? nullptr
               : reinterpret_cast<T*>(static_cast<char*>(tensor_->data) + tensor_->byte_offset);
  }

  bool is_float() const;  // fp32, fp16 or bf16
  DType dtype() const;    // of a tensor that is_float()
  bool is_int(int bits) const;
  bool is_float32() const { return is_float() && dtype() == DType::kFloat32; }
  std::string dtype_name() const;
  std::string shape_string() const;

  void require() const;  // given at all
  void require_rank(int rank) const;
  void require_shape(std::initializer_list<Extent> extents) const;
  void require_same_device(const TensorArg& other) const;
  void require_last_contiguous() const;
  void require_contiguous() const;
  void require_int32() const;
  // No two elements in the same place, and not the same memory as `input`.
  void require_writable(std::initializer_list<TensorArg> inputs) const;

  // (batch, rows, heads, d), or (rows, heads, d) with batch_stride 0.
  Operand operand() const;

 private:
  const char* name_;
  const fap_tensor* tensor_;
};

}  // namespace flash_attn_plus
