// A test with the fake driver, a cache directory of its own, and the environment as it was after
// it.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "fake_driver/fake_driver.h"

namespace flash_attn_plus::cuda {

// Loaded once, by its path; what opens libcuda.so.1 by name then finds it.
inline void* fake_driver() {
  static void* const library = dlopen(FAP_FAKE_DRIVER, RTLD_NOW | RTLD_LOCAL);
  return library;
}

class RuntimeTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(fake_driver(), nullptr) << dlerror();
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = std::filesystem::temp_directory_path() /
                 ("fap-" + std::to_string(::getpid()) + "-" + test->name());
    std::filesystem::remove_all(directory_);
    setenv("FLASH_ATTN_PLUS_CACHE_DIR", directory_.c_str(), 1);
  }
  void TearDown() override {
    unsetenv("FLASH_ATTN_PLUS_CACHE_DIR");
    std::error_code error;
    std::filesystem::permissions(directory_, std::filesystem::perms::owner_all, error);
    std::filesystem::remove_all(directory_, error);
  }

  template <typename Function>
  static Function* driver_function(const char* name) {
    return reinterpret_cast<Function*>(dlsym(fake_driver(), name));
  }
  static FakeDriverState state() {
    return driver_function<FakeDriverStateFunction>("fake_driver_state")();
  }
  static void fail_next(const char* function, int result) {
    driver_function<FakeDriverFailFunction>("fake_driver_fail")(function, result);
  }
  static int contexts() {
    return driver_function<FakeDriverContextsFunction>("fake_driver_contexts")();
  }

  size_t num_files() const {
    size_t count = 0;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(directory_, error)) {
      count += entry.is_regular_file();
    }
    return count;
  }

  std::filesystem::path directory_;
};

// One that compiles: skipped where there is no NVRTC.
class CompilingTest : public RuntimeTest {
 protected:
  void SetUp() override {
    RuntimeTest::SetUp();
    if (std::string(FAP_NVRTC_DIRECTORY).empty()) {
      GTEST_SKIP() << "NVRTC is not installed (pip install nvidia-cuda-nvrtc)";
    }
    setenv("FLASH_ATTN_PLUS_NVRTC", FAP_NVRTC_DIRECTORY, 0);
  }
};

// The text of the Error that a call throws; empty when it throws none.
template <typename F>
std::string error_of(const F& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace flash_attn_plus::cuda
