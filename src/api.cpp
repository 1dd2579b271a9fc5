// The C ABI: validate, choose the backend of the device, run.
#include <cstddef>
#include <exception>
#include <memory>
#include <string>

#include "attention/error.h"
#include "attention/validate.h"
#include "cpu/cpu.h"
#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {
namespace {

thread_local std::string last_error;

template <typename F>
fap_status guarded(const F& body) noexcept {
  try {
    body();
    return FAP_OK;
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

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void kvcache(const fap_kvcache_args& args) {
  KvCacheParams call = validate(args);
  std::unique_ptr<std::byte[]> rotated;
  if (call.appends) {
    AppendParams& append = call.append;
    if (append.rotary_cos != nullptr) {
      const int64_t row = append.num_heads * append.head_dim;
      const int64_t elements = append.batch * append.seqlen_q * row;
      rotated.reset(new std::byte[static_cast<size_t>(elements * size_of(append.dtype))]);
      append.q_rotated = {rotated.get(), append.seqlen_q * row, row, append.head_dim};
      call.forward.q = append.q_rotated;
    }
    cpu::append(append);
  }
  cpu::forward(call.forward);
}

}  // namespace
}  // namespace flash_attn_plus

using namespace flash_attn_plus;

extern "C" {

fap_status fap_forward(const fap_forward_args* args) {
  return guarded([&] { cpu::forward(validate(deref(args))); });
}

fap_status fap_backward(const fap_backward_args* args) {
  return guarded([&] { cpu::backward(validate(deref(args))); });
}

fap_status fap_kvcache(const fap_kvcache_args* args) {
  return guarded([&] { kvcache(deref(args)); });
}

fap_status fap_rotary(const fap_rotary_args* args) {
  return guarded([&] { cpu::rotary(validate(deref(args))); });
}

fap_status fap_forward_supports(const fap_forward_args* args) {
  return guarded([&] { validate(deref(args)); });
}

fap_status fap_backward_supports(const fap_backward_args* args) {
  return guarded([&] { validate(deref(args)); });
}

const char* fap_last_error(void) { return last_error.c_str(); }

const char* fap_version(void) { return FLASH_ATTN_PLUS_VERSION; }

const char* fap_cpu_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = cpu::selected_isa().c_str(); });
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
