#include "attention/tensor_arg.h"

#include <sstream>

#include "attention/error.h"

namespace flash_attn_plus {
namespace {

enum DLTypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5, kBool = 6 };

std::string join(const int64_t* values, int count) {
  std::ostringstream text;
  text << "(";
  for (int i = 0; i < count; ++i) text << (i > 0 ? ", " : "") << values[i];
  text << ")";
  return text.str();
}

}  // namespace

int64_t TensorArg::stride(int axis) const {
  if (tensor_->strides != nullptr) return tensor_->strides[axis];
  int64_t stride = 1;
  for (int i = tensor_->ndim - 1; i > axis; --i) stride *= tensor_->shape[i];
  return stride;
}

int64_t TensorArg::numel() const {
  int64_t count = 1;
  for (int i = 0; i < ndim(); ++i) count *= shape(i);
  return count;
}

bool TensorArg::is_float() const {
  const fap_dtype type = tensor_->dtype;
  if (type.lanes != 1) return false;
  return (type.code == kFloat && (type.bits == 32 || type.bits == 16)) ||
         (type.code == kBFloat && type.bits == 16);
}

DType TensorArg::dtype() const {
  if (tensor_->dtype.code == kBFloat) return DType::kBFloat16;
  return tensor_->dtype.bits == 32 ? DType::kFloat32 : DType::kFloat16;
}

bool TensorArg::is_int(int bits) const {
  return tensor_->dtype.code == kInt && tensor_->dtype.bits == bits && tensor_->dtype.lanes == 1;
}

std::string TensorArg::dtype_name() const {
  const fap_dtype type = tensor_->dtype;
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case kInt:
      return "int" + bits;
    case kUInt:
      return "uint" + bits;
    case kFloat:
      return "float" + bits;
    case kBFloat:
      return "bfloat" + bits;
    case kComplex:
      return "complex" + bits;
    case kBool:
      return "bool";
    default:
      return "type code " + std::to_string(type.code) + " of " + bits + " bits";
  }
}

std::string TensorArg::shape_string() const { return join(tensor_->shape, tensor_->ndim); }

void TensorArg::require() const {
  if (tensor_ == nullptr) fail(name_, " must be given");
}

void TensorArg::require_rank(int rank) const {
  require();
  if (ndim() != rank) {
    fail(name_, " must have ", rank, " dimensions, but got shape ", shape_string());
  }
}

void TensorArg::require_shape(std::initializer_list<Extent> extents) const {
  require();
  bool matches = ndim() == static_cast<int>(extents.size());
  int axis = 0;
  for (const Extent& extent : extents) {
    if (matches && extent.size != kAny && shape(axis) != extent.size) matches = false;
    ++axis;
  }
  if (matches) return;
  std::ostringstream names, sizes;
  const char* separator = "";
  for (const Extent& extent : extents) {
    names << separator << extent.name;
    sizes << separator;
    if (extent.size == kAny) {
      sizes << "any";
    } else {
      sizes << extent.size;
    }
    separator = ", ";
  }
  fail(name_, " must have shape (", names.str(), "), that is (", sizes.str(), "), but got ",
       shape_string());
}

void TensorArg::require_same_device(const TensorArg& other) const {
  const fap_device a = device(), b = other.device();
  if (a.device_type == b.device_type && a.device_id == b.device_id) return;
  fail(name_, " must be on the same device as ", other.name_, " (type ", b.device_type, ", index ",
       b.device_id, "), but is on (type ", a.device_type, ", index ", a.device_id, ")");
}

void TensorArg::require_last_contiguous() const {
  const int last = ndim() - 1;
  if (numel() == 0 || shape(last) == 1 || stride(last) == 1) return;
  fail("Input tensor must have contiguous last dimension, but ", name_, " has stride ",
       stride(last), " there");
}

void TensorArg::require_contiguous() const {
  if (numel() == 0) return;
  int64_t expected = 1;
  for (int axis = ndim() - 1; axis >= 0; --axis) {
    if (shape(axis) != 1 && stride(axis) != expected) {
      fail(name_, " must be contiguous, but has stride ", stride(axis), " in dimension ", axis);
    }
    expected *= shape(axis);
  }
}

void TensorArg::require_int32() const {
  if (!is_int(32)) fail(name_, " must have dtype int32, but has ", dtype_name());
}

void TensorArg::require_writable(std::initializer_list<TensorArg> inputs) const {
  if (numel() == 0) return;
  for (int axis = 0; axis < ndim(); ++axis) {
    if (shape(axis) > 1 && stride(axis) == 0) {
      fail(name_, " is written to, but is expanded (stride 0) in dimension ", axis);
    }
  }
  for (const TensorArg& input : inputs) {
    if (input && input.numel() > 0 && input.data() == data()) {
      fail(name_, " must not be the same memory as ", input.name());
    }
  }
}

Operand TensorArg::operand() const {
  const int first = ndim() - 3;
  return {data(), first == 1 ? stride(0) : 0, stride(first), stride(first + 1)};
}

}  // namespace flash_attn_plus
