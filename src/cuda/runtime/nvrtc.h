// NVRTC, the run-time compiler, opened when it is first needed. Users have it through torch.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace flash_attn_plus::cuda {

using NvrtcResult = int;
constexpr NvrtcResult kNvrtcSuccess = 0;

// Programs are opaque. The same interface in 12.x and 13.x.
struct Nvrtc {
  NvrtcResult (*version_of)(int* major, int* minor);
  const char* (*error_text)(NvrtcResult);
  NvrtcResult (*num_supported)(int* count);
  NvrtcResult (*supported)(int* architectures);
  NvrtcResult (*create)(void** program, const char* source, const char* name, int num_headers,
                        const char* const* headers, const char* const* header_names);
  NvrtcResult (*compile)(void* program, int num_options, const char* const* options);
  NvrtcResult (*log_size)(void* program, size_t* size);
  NvrtcResult (*log)(void* program, char* text);
  NvrtcResult (*cubin_size)(void* program, size_t* size);
  NvrtcResult (*cubin)(void* program, char* image);
  NvrtcResult (*ptx_size)(void* program, size_t* size);
  NvrtcResult (*ptx)(void* program, char* image);
  NvrtcResult (*destroy)(void** program);

  int major = 0, minor = 0;
  std::string path;
  std::vector<int> architectures;  // that it compiles for, ascending: 80 is sm_80
};

// Opened once; a failure throws Error with everything that was tried, and the next call tries
// again.
const Nvrtc& nvrtc();

// Directories, separated by colons, that are searched first.
void set_nvrtc_directories(const std::string& directories);

// Files to try, in this order: FLASH_ATTN_PLUS_NVRTC (a file or a directory), the given
// directories, the toolkit (CUDA_HOME, CUDA_PATH, /usr/local/cuda), the loader's own search.
// `newest_major`: what the driver can load, 0 for any.
std::vector<std::string> nvrtc_candidates(int newest_major);

}  // namespace flash_attn_plus::cuda
