// Shared libraries opened at run time.
#pragma once

#include <dlfcn.h>

#include <string>

namespace flash_attn_plus::cuda {

// Null, with the loader's reason in `reason`, when it cannot be opened. Never closed.
inline void* open_library(const std::string& path, std::string& reason, int scope = RTLD_LOCAL) {
  void* library = dlopen(path.c_str(), RTLD_NOW | scope);
  if (library == nullptr) {
    const char* error = dlerror();
    reason = error != nullptr ? error : "unknown error";
  }
  return library;
}

// Binds a function pointer to the library's function of this name; false when it has none.
template <typename Function>
bool bind(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace flash_attn_plus::cuda
