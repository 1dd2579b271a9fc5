#include "cuda/runtime/nvrtc.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <sstream>

#include "attention/error.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/library.h"

namespace flash_attn_plus::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int kOldestMajor = 12, kNewestMajor = 13;

std::mutex directories_mutex;
std::string& given_directories() {
  static auto& directories = *new std::string;
  return directories;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ':');) {
    if (!part.empty()) parts.push_back(part);
  }
  return parts;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Files of a directory whose name begins with `prefix`, except the variants that NVIDIA's wheels
// call "alt"; the newest first.
std::vector<std::string> files_in(const fs::path& directory, const std::string& prefix) {
  std::vector<std::string> files;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, error)) {
    if (entry.path().filename().string().rfind(prefix, 0) == 0) files.push_back(entry.path());
  }
  std::sort(files.rbegin(), files.rend());
  return files;
}

// The newest CUDA whose machine code the driver loads; 0 without a driver, where anything goes.
int newest_loadable_major() {
  try {
    int version = 0;
    return driver().version(&version) == kDriverSuccess ? version / 1000 : 0;
  } catch (const Error&) {
    return 0;
  }
}

void bind_all(void* library, Nvrtc& nvrtc) {
  const auto get = [&](auto& function, const char* name) {
    if (!bind(library, name, function)) fail("it has no function ", name);
  };
  get(nvrtc.version_of, "nvrtcVersion");
  get(nvrtc.error_text, "nvrtcGetErrorString");
  get(nvrtc.num_supported, "nvrtcGetNumSupportedArchs");
  get(nvrtc.supported, "nvrtcGetSupportedArchs");
  get(nvrtc.create, "nvrtcCreateProgram");
  get(nvrtc.compile, "nvrtcCompileProgram");
  get(nvrtc.log_size, "nvrtcGetProgramLogSize");
  get(nvrtc.log, "nvrtcGetProgramLog");
  get(nvrtc.cubin_size, "nvrtcGetCUBINSize");
  get(nvrtc.cubin, "nvrtcGetCUBIN");
  get(nvrtc.ptx_size, "nvrtcGetPTXSize");
  get(nvrtc.ptx, "nvrtcGetPTX");
  get(nvrtc.destroy, "nvrtcDestroyProgram");
}

Nvrtc open_file(const std::string& path, int newest_major) {
  std::string reason;
  // The library opens its builtins by name when it compiles, and does not look beside itself: they
  // must be there already.
  if (path.find('/') != std::string::npos) {
    for (const std::string& file : files_in(fs::path(path).parent_path(), "libnvrtc-builtins.so")) {
      std::string ignored;
      open_library(file, ignored);
    }
  }
  void* library = open_library(path, reason);
  if (library == nullptr) fail(reason);
  Nvrtc nvrtc;
  nvrtc.path = path;
  bind_all(library, nvrtc);
  int count = 0;
  if (nvrtc.version_of(&nvrtc.major, &nvrtc.minor) != kNvrtcSuccess ||
      nvrtc.num_supported(&count) != kNvrtcSuccess) {
    fail("it does not tell its version");
  }
  if (nvrtc.major < kOldestMajor) {
    fail("it is version ", nvrtc.major, ".", nvrtc.minor, ", and 12.0 or newer is needed");
  }
  if (newest_major != 0 && nvrtc.major > newest_major) {
    fail("it is version ", nvrtc.major, ".", nvrtc.minor,
         ", newer than the driver, which is for CUDA ", newest_major);
  }
  nvrtc.architectures.resize(static_cast<size_t>(count));
  nvrtc.supported(nvrtc.architectures.data());
  std::sort(nvrtc.architectures.begin(), nvrtc.architectures.end());
  return nvrtc;
}

Nvrtc open() {
  const int newest_major = newest_loadable_major();
  std::string tried;
  for (const std::string& candidate : nvrtc_candidates(newest_major)) {
    try {
      return open_file(candidate, newest_major);
    } catch (const Error& error) {
      tried += "\n  " + candidate + ": " + error.what();
    }
  }
  fail(
      "flash_attn compiles its CUDA kernels with NVRTC, which was not found. Install it with "
      "pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for a driver of CUDA 12), or name its "
      "file or directory in FLASH_ATTN_PLUS_NVRTC. Tried:",
      tried);
}

}  // namespace

std::vector<std::string> nvrtc_candidates(int newest_major) {
  std::vector<std::string> candidates;
  const auto add_directory = [&](const fs::path& directory) {
    // With the version, as in wheels, or without one, as in toolkits for development.
    const std::vector<std::string> files = files_in(directory, "libnvrtc.so");
    candidates.insert(candidates.end(), files.begin(), files.end());
    if (files.empty()) candidates.push_back(directory / "libnvrtc.so");
  };
  const std::string chosen = environment("FLASH_ATTN_PLUS_NVRTC");
  if (!chosen.empty()) {
    if (fs::is_directory(chosen)) {
      add_directory(chosen);
    } else {
      candidates.push_back(chosen);
    }
  }
  {
    const std::lock_guard lock(directories_mutex);
    for (const std::string& directory : split(given_directories())) add_directory(directory);
  }
  for (const std::string& home :
       {environment("CUDA_HOME"), environment("CUDA_PATH"), std::string("/usr/local/cuda")}) {
    if (!home.empty()) add_directory(fs::path(home) / "lib64");
  }
  for (int major = newest_major == 0 ? kNewestMajor : newest_major; major >= kOldestMajor;
       --major) {
    candidates.push_back("libnvrtc.so." + std::to_string(major));
  }
  return candidates;
}

void set_nvrtc_directories(const std::string& directories) {
  const std::lock_guard lock(directories_mutex);
  given_directories() = directories;
}

const Nvrtc& nvrtc() {
  static std::atomic<const Nvrtc*> opened = nullptr;
  static std::mutex mutex;
  if (const Nvrtc* found = opened.load(std::memory_order_acquire)) return *found;
  const std::lock_guard lock(mutex);
  if (opened.load() == nullptr) opened = new Nvrtc(open());
  return *opened.load();
}

}  // namespace flash_attn_plus::cuda
