// The C ABI: validate, choose the backend of the device, run.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <sstream>
#include <string>

#include "attention/checks.h"
#include "attention/error.h"
#include "attention/tensor_arg.h"
#include "attention/validate.h"
#include "cpu/cpu.h"
#include "cuda/catalog.h"
#include "cuda/cuda.h"
#include "cuda/explain.h"
#include "cuda/runtime/cache.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/image.h"
#include "cuda/runtime/nvrtc.h"
#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {
namespace {

thread_local std::string last_error;
thread_local size_t workspace_needed = 0;

// `body` returns a status.
template <typename F>
fap_status guarded(const F& body) noexcept {
  try {
    return body();
  } catch (const ConstraintError& error) {
    last_error = error.what();
    return FAP_CONSTRAINT_ERROR;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return FAP_ERROR;
  } catch (const std::exception& error) {
    last_error = error.what();
    return FAP_ERROR;
  }
}

template <typename Args>
const Args& deref(const Args* args) {
  if (args == nullptr) fail("args must not be NULL");
  return *args;
}

// The tensor that says where the call runs: validation has seen that it is given and that the
// others are with it.
template <typename Args>
fap_device device_of(const Args& args) {
  if constexpr (requires { args.q; }) {
    return args.q->device;
  } else {
    return args.x->device;
  }
}

template <typename Args>
bool on_cpu(const Args& args) {
  return device_of(args).device_type == kDeviceCpu;
}

// Everything that can be wrong with a call that this build is to serve.
template <typename Args>
auto validated(const Args& args) {
  if constexpr (requires { args.q; }) {
    check_device({"q", args.q});
  } else {
    check_device({"x", args.x});
  }
  return validate(args);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// ---- the operations on each device
// ----------------------------------------------------------------

void run_on_cpu(const ForwardParams& params) { cpu::forward(params); }
void run_on_cpu(const BackwardParams& params) { cpu::backward(params); }
void run_on_cpu(const RotaryParams& params) { cpu::rotary(params); }

void run_on_cpu(KvCacheParams params) {
  std::unique_ptr<std::byte[]> rotated;
  if (params.appends) {
    AppendParams& append = params.append;
    if (append.rotary_cos != nullptr) {
      const int64_t row = append.num_heads * append.head_dim;
      const int64_t elements = append.batch * append.seqlen_q * row;
      rotated.reset(new std::byte[static_cast<size_t>(elements * size_of(append.dtype))]);
      append.q_rotated = {rotated.get(), append.seqlen_q * row, row, append.head_dim};
      params.forward.q = append.q_rotated;
    }
    cpu::append(append);
  }
  cpu::forward(params.forward);
}

size_t cuda_workspace(const ForwardParams& params, int device) {
  return cuda::forward_workspace(params, device);
}
size_t cuda_workspace(const BackwardParams& params, int device) {
  return cuda::backward_workspace(params, device);
}
size_t cuda_workspace(const KvCacheParams& params, int device) {
  return cuda::kvcache_workspace(params, device);
}
size_t cuda_workspace(const RotaryParams&, int) { return 0; }

void run_on_cuda(const ForwardParams& params, const cuda::Call& call) {
  cuda::forward(params, call);
}
void run_on_cuda(const BackwardParams& params, const cuda::Call& call) {
  cuda::backward(params, call);
}
void run_on_cuda(const KvCacheParams& params, const cuda::Call& call) {
  cuda::kvcache(params, call);
}
void run_on_cuda(const RotaryParams& params, const cuda::Call& call) { cuda::rotary(params, call); }

// ---- every entry point
// ----------------------------------------------------------------------------

template <typename Args>
cuda::Call cuda_call(const Args& args) {
  cuda::Call call;
  call.device = device_of(args).device_id;
  call.stream = args.stream;
  if constexpr (requires { args.workspace; }) {
    if (reinterpret_cast<uintptr_t>(args.workspace) % cuda::kWorkspaceAlignment != 0) {
      fail("workspace must be aligned to ", cuda::kWorkspaceAlignment, " bytes");
    }
    call.workspace = args.workspace;
    call.workspace_bytes = args.workspace == nullptr ? 0 : args.workspace_size;
  }
  return call;
}

template <typename Args>
fap_status run(const Args* pointer) {
  return guarded([&] {
    const Args& args = deref(pointer);
    const auto params = validated(args);
    if (on_cpu(args)) {
      run_on_cpu(params);
      return FAP_OK;
    }
    const cuda::Call call = cuda_call(args);
    const size_t needed = cuda_workspace(params, call.device);
    if (needed > call.workspace_bytes) {
      workspace_needed = needed;
      last_error = "the call needs a workspace of " + std::to_string(needed) + " bytes, but got " +
                   std::to_string(call.workspace_bytes);
      return FAP_NEEDS_WORKSPACE;
    }
    const cuda::DeviceGuard guard(call.device);
    run_on_cuda(params, call);
    return FAP_OK;
  });
}

template <typename Args>
fap_status supports(const Args* pointer) {
  return guarded([&] {
    const Args& args = deref(pointer);
    validated(args);
    if (!on_cpu(args)) cuda::device_properties(device_of(args).device_id);
    return FAP_OK;
  });
}

template <typename Args>
fap_status check(const Args* pointer) {
  return guarded([&] {
    validate(deref(pointer));
    return FAP_OK;
  });
}

template <typename Args>
fap_status workspace(const Args* pointer, size_t* bytes) {
  return guarded([&] {
    const Args& args = deref(pointer);
    const auto params = validated(args);
    *bytes = on_cpu(args) ? 0 : cuda_workspace(params, device_of(args).device_id);
    return FAP_OK;
  });
}

// ---- kernels without a call
// -----------------------------------------------------------------------

std::string kernel_lines(int arch) {
  std::string lines;
  for (const cuda::CatalogEntry& kernel : cuda::all_kernels(cuda::typical_device(arch))) {
    lines += kernel.source.spec + "\n";
  }
  return lines;
}

std::string compile_kernel(int arch, const std::string& name) {
  const cuda::DeviceProperties device = cuda::typical_device(arch);
  for (const cuda::CatalogEntry& kernel : cuda::all_kernels(device)) {
    if (kernel.source.spec != name) continue;
    const cuda::Image image = cuda::image_for(kernel.source, arch);
    const cuda::KernelUse use = cuda::use_of(image.compilation.log);
    std::ostringstream report;
    report << "from=" << (image.from_disk ? "disk" : "compiled") << "\nkept=" << image.kept
           << "\nseconds=" << image.compilation.seconds << "\nregisters=" << use.registers
           << "\nstack_bytes=" << use.stack_bytes << "\nspill_bytes=" << use.spill_bytes
           << "\nshared_bytes=" << use.shared_bytes + kernel.limits.shared_bytes
           << "\nexcess=" << cuda::excess(use, kernel.limits, device) << "\n";
    return report.str();
  }
  fail("no call on sm_", arch, " uses a kernel ", name);
}

// What `describe` says, or why it cannot, in one line.
template <typename F>
std::string line_of(const F& describe) {
  std::string line;
  try {
    line = describe();
  } catch (const Error& error) {
    line = error.what();
  }
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line + "\n";
}

std::string runtime_lines() {
  return "driver: " + line_of(&cuda::describe_driver) + "compiler: " + line_of([] {
           const cuda::Nvrtc& compiler = cuda::nvrtc();
           return "NVRTC " + cuda::compiler_version(compiler) + ", " + compiler.path;
         });
}

// The text that `make` gives, or null when it throws.
template <typename F>
const char* text_of(const F& make) noexcept {
  thread_local std::string text;
  const fap_status status = guarded([&] {
    text = make();
    return FAP_OK;
  });
  return status == FAP_OK ? text.c_str() : nullptr;
}

}  // namespace
}  // namespace flash_attn_plus

using namespace flash_attn_plus;

extern "C" {

fap_status fap_forward(const fap_forward_args* args) { return run(args); }
fap_status fap_backward(const fap_backward_args* args) { return run(args); }
fap_status fap_kvcache(const fap_kvcache_args* args) { return run(args); }
fap_status fap_rotary(const fap_rotary_args* args) { return run(args); }

fap_status fap_forward_supports(const fap_forward_args* args) { return supports(args); }
fap_status fap_backward_supports(const fap_backward_args* args) { return supports(args); }

fap_status fap_forward_check(const fap_forward_args* args) { return check(args); }
fap_status fap_backward_check(const fap_backward_args* args) { return check(args); }
fap_status fap_kvcache_check(const fap_kvcache_args* args) { return check(args); }
fap_status fap_rotary_check(const fap_rotary_args* args) { return check(args); }

size_t fap_workspace_needed(void) { return workspace_needed; }

fap_status fap_forward_workspace(const fap_forward_args* args, size_t* bytes) {
  return workspace(args, bytes);
}
fap_status fap_backward_workspace(const fap_backward_args* args, size_t* bytes) {
  return workspace(args, bytes);
}
fap_status fap_kvcache_workspace(const fap_kvcache_args* args, size_t* bytes) {
  return workspace(args, bytes);
}

fap_status fap_set_nvrtc_directories(const char* directories) {
  return guarded([&] {
    cuda::set_nvrtc_directories(directories == nullptr ? "" : directories);
    return FAP_OK;
  });
}

const char* fap_cuda_runtime(void) { return text_of(&runtime_lines); }
const char* fap_cuda_kernels(int32_t arch) {
  return text_of([&] { return kernel_lines(arch); });
}
const char* fap_cuda_compile(int32_t arch, const char* kernel) {
  return text_of([&] { return compile_kernel(arch, kernel == nullptr ? "" : kernel); });
}

const char* fap_cuda_explain(const fap_cuda_explain_args* args) {
  return text_of([&] {
    check_struct_size(deref(args));
    return cuda::explain(*args);
  });
}

const char* fap_last_error(void) { return last_error.c_str(); }

const char* fap_version(void) { return FLASH_ATTN_PLUS_VERSION; }

const char* fap_cpu_isa(void) {
  const char* name = nullptr;
  guarded([&] {
    name = cpu::selected_isa().c_str();
    return FAP_OK;
  });
  return name;
}

const char* fap_cpu_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const std::string& isa : cpu::runnable_isas()) {
      if (!joined.empty()) joined += ",";
      joined += isa;
    }
    return joined;
  }();
  return names.c_str();
}

}  // extern "C"
