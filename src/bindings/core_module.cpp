// The Python binding: DLPack views in, an exception out. The only file that sees apache-tvm-ffi.
//
// Every operation takes the fields of its C struct in their order, without `size`; None for a
// tensor that is not given, the stream and the workspace as integers. So the binding of an
// operation follows from its struct. The workspace and its size may be left out: it then comes from
// the allocator of the tensors' framework, where that has lent one. The result is 0, or the bytes
// of workspace without which nothing was done.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "flash_attn_plus/attention.h"

namespace {

using tvm::ffi::AnyView;
using tvm::ffi::TensorView;

// One argument, which becomes whatever type the field that it initialises has. Zero when `value` is
// null.
class Field {
 public:
  Field(const char* operation, size_t index, const TVMFFIAny* value, fap_tensor& storage)
      : operation_(operation), index_(index), value_(value), storage_(storage) {}

  operator const fap_tensor*() const {  // NOLINT: implicit
    if (value_ == nullptr || value_->type_index == TVMFFITypeIndex::kTVMFFINone) return nullptr;
    const TensorView view = get<TensorView>("a tensor or None");
    storage_ = {view.data_ptr(),
                {static_cast<int32_t>(view.device().device_type), view.device().device_id},
                view.ndim(),
                {view.dtype().code, view.dtype().bits, view.dtype().lanes},
                const_cast<int64_t*>(view.shape().data()),
                const_cast<int64_t*>(view.strides().data()),
                view.byte_offset()};
    return &storage_;
  }
  operator double() const { return value_ == nullptr ? 0.0 : get<double>("a number"); }  // NOLINT
  operator int64_t() const { return integer(); }                                         // NOLINT
  operator int32_t() const { return static_cast<int32_t>(integer()); }                   // NOLINT
  operator size_t() const { return static_cast<size_t>(integer()); }                     // NOLINT
  operator void*() const { return reinterpret_cast<void*>(integer()); }                  // NOLINT

 private:
  int64_t integer() const { return value_ == nullptr ? 0 : get<int64_t>("an integer"); }

  template <typename T>
  T get(const char* expected) const {
    const AnyView view = AnyView::CopyFromTVMFFIAny(*value_);
    if (const std::optional<T> value = view.try_cast<T>()) return *value;
    throw tvm::ffi::Error("TypeError",
                          std::string(operation_) + ": argument " + std::to_string(index_) +
                              " must be " + expected + ", but is " + view.GetTypeKey(),
                          "");
  }

  const char* operation_;
  size_t index_;
  const TVMFFIAny* value_;
  fap_tensor& storage_;
};

struct AnyField {
  template <typename T>
  operator T() const;  // NOLINT: implicit
};

// Number of fields of an argument struct after `size`.
template <typename Args, size_t... I>
constexpr bool takes(std::index_sequence<I...>) {
  return requires { Args{size_t{}, (static_cast<void>(I), AnyField{})...}; };
}
template <typename Args, size_t N = 1>
constexpr size_t count_fields() {
  if constexpr (takes<Args>(std::make_index_sequence<N>{})) {
    return count_fields<Args, N + 1>();
  } else {
    return N - 1;
  }
}

// Memory from the framework whose tensors the call got, ordered by its current stream of `device`.
// Nothing where it lends no allocator or has no memory left: its own error is the one to see then.
std::optional<tvm::ffi::Tensor> allocate(size_t bytes, fap_device device) {
  if (TVMFFIEnvGetDLPackManagedTensorAllocator() == nullptr) return std::nullopt;
  try {
    return tvm::ffi::Tensor::FromEnvAlloc(
        TVMFFIEnvTensorAlloc, {static_cast<int64_t>(bytes)}, DLDataType{kDLUInt, 8, 1},
        DLDevice{static_cast<DLDeviceType>(device.device_type), device.device_id});
  } catch (const tvm::ffi::Error&) {
    return std::nullopt;
  }
}

template <typename Result, typename Args, size_t... I>
Result call(const char* operation, Result (*function)(const Args*), const TVMFFIAny* values,
            size_t num_values, std::index_sequence<I...>) {
  fap_tensor storage[sizeof...(I)];
  Args args{sizeof(Args),
            Field(operation, I, I < num_values ? &values[I] : nullptr, storage[I])...};
  const Result result = function(&args);
  if constexpr (std::is_same_v<Result, fap_status> && requires { args.workspace; }) {
    if (result == FAP_NEEDS_WORKSPACE && args.workspace == nullptr) {
      const size_t bytes = fap_workspace_needed();
      if (const std::optional<tvm::ffi::Tensor> workspace = allocate(bytes, args.q->device)) {
        args.workspace = workspace->data_ptr();
        args.workspace_size = bytes;
        return function(&args);
      }
    }
  }
  return result;
}

template <typename Result, typename Args>
Result call(const char* operation, Result (*function)(const Args*), const TVMFFIAny* values,
            int32_t num_values) {
  constexpr size_t kNumFields = count_fields<Args>();
  const size_t given = static_cast<size_t>(num_values);
  if (given > kNumFields) {
    throw tvm::ffi::Error("TypeError",
                          std::string(operation) + " takes at most " + std::to_string(kNumFields) +
                              " arguments, but got " + std::to_string(given),
                          "");
  }
  return call(operation, function, values, given, std::make_index_sequence<kNumFields>{});
}

// Zero, or the bytes of workspace without which nothing was done.
int64_t checked(fap_status status) {
  if (status == FAP_OK) return 0;
  if (status == FAP_NEEDS_WORKSPACE) return static_cast<int64_t>(fap_workspace_needed());
  throw tvm::ffi::Error(status == FAP_CONSTRAINT_ERROR ? "ConstraintError" : "RuntimeError",
                        fap_last_error(), "");
}

tvm::ffi::String text_or_error(const char* text) {
  if (text == nullptr) throw tvm::ffi::Error("RuntimeError", fap_last_error(), "");
  return text;
}
tvm::ffi::String cpu_isa() { return text_or_error(fap_cpu_isa()); }
tvm::ffi::String cpu_isas() { return fap_cpu_isas(); }
tvm::ffi::String version() { return fap_version(); }
tvm::ffi::String cuda_runtime() { return text_or_error(fap_cuda_runtime()); }
tvm::ffi::String cuda_kernels(int64_t arch) {
  return text_or_error(fap_cuda_kernels(static_cast<int32_t>(arch)));
}
tvm::ffi::String cuda_compile(int64_t arch, const tvm::ffi::String& kernel) {
  return text_or_error(fap_cuda_compile(static_cast<int32_t>(arch), kernel.c_str()));
}
void set_nvrtc_directories(const tvm::ffi::String& directories) {
  fap_set_nvrtc_directories(directories.c_str());
}

}  // namespace

#define FAP_EXPORT(name, function, check)                                                      \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* args,             \
                                                     int32_t num_args, TVMFFIAny* result) {    \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                 \
    *reinterpret_cast<tvm::ffi::Any*>(result) = check(call(#name, &function, args, num_args)); \
    TVM_FFI_SAFE_CALL_END();                                                                   \
  }

FAP_EXPORT(forward, fap_forward, checked)
FAP_EXPORT(backward, fap_backward, checked)
FAP_EXPORT(kvcache, fap_kvcache, checked)
FAP_EXPORT(rotary, fap_rotary, checked)
FAP_EXPORT(forward_supports, fap_forward_supports, checked)
FAP_EXPORT(backward_supports, fap_backward_supports, checked)
FAP_EXPORT(forward_check, fap_forward_check, checked)
FAP_EXPORT(backward_check, fap_backward_check, checked)
FAP_EXPORT(kvcache_check, fap_kvcache_check, checked)
FAP_EXPORT(rotary_check, fap_rotary_check, checked)
FAP_EXPORT(cuda_explain, fap_cuda_explain, text_or_error)

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isa, cpu_isa)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isas, cpu_isas)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_runtime, cuda_runtime)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_kernels, cuda_kernels)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cuda_compile, cuda_compile)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_nvrtc_directories, set_nvrtc_directories)
