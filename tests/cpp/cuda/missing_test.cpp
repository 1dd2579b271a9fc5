// What is said when a part of the machine is missing, and that the next call works once it is
// there.
#include <dlfcn.h>
#include <sys/wait.h>

#include "cuda/fixture.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/image.h"
#include "cuda/runtime/kernel.h"
#include "cuda/runtime/nvrtc.h"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {
namespace {

TEST(MissingDriverTest, IsNamedAndLookedForAgain) {
  if (void* library = dlopen("libcuda.so.1", RTLD_NOW)) {
    dlclose(library);
    GTEST_SKIP() << "there is a driver";
  }
  const std::string error = error_of([] { driver(); });
  EXPECT_NE(error.find("found no NVIDIA driver on this machine: libcuda.so.1"), std::string::npos)
      << error;
  ASSERT_NE(fake_driver(), nullptr);
  EXPECT_EQ(error_of([] { driver(); }), "");
}

class MissingCompilerTest : public CompilingTest {
 protected:
  const KernelSource source_{to_text(RotarySpec{}), RotarySpec::kKernel, RotarySpec::kEntry};
};

TEST_F(MissingCompilerTest, IsNamedAndLookedForAgain) {
  if (dlopen("libnvrtc.so.13", RTLD_NOW) != nullptr ||
      dlopen("libnvrtc.so.12", RTLD_NOW) != nullptr) {
    GTEST_SKIP() << "the loader finds an NVRTC, or another test has opened one";
  }
  setenv("FLASH_ATTN_PLUS_NVRTC", "/no/such/libnvrtc.so.13", 1);
  setenv("CUDA_HOME", "/no/toolkit", 1);
  const std::string error = error_of([&] { image_for(source_, 90); });
  for (const char* part :
       {"NVRTC, which was not found", "pip install nvidia-cuda-nvrtc", "/no/such/libnvrtc.so.13",
        "/no/toolkit/lib64/libnvrtc.so", "libnvrtc.so.12", "is not in the cache either",
        directory_.c_str(), "python -m flash_attn compile"}) {
    EXPECT_NE(error.find(part), std::string::npos) << part << " in " << error;
  }
  setenv("FLASH_ATTN_PLUS_NVRTC", FAP_NVRTC_DIRECTORY, 1);
  EXPECT_EQ(error_of([&] { image_for(source_, 90); }), "");
  unsetenv("CUDA_HOME");
}

TEST_F(MissingCompilerTest, IsNotNeededForWhatIsCached) {
  if (dlopen("libnvrtc.so.13", RTLD_NOW) != nullptr ||
      dlopen("libnvrtc.so.12", RTLD_NOW) != nullptr) {
    GTEST_SKIP() << "the loader finds an NVRTC, or another test has opened one";
  }
  const pid_t child = fork();  // whose NVRTC is its own
  if (child == 0) _exit(error_of([&] { image_for(source_, 90); }).empty() ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_EQ(status, 0);
  setenv("FLASH_ATTN_PLUS_NVRTC", "/no/such/libnvrtc.so.13", 1);
  EXPECT_TRUE(image_for(source_, 90).from_disk);
}

}  // namespace
}  // namespace flash_attn_plus::cuda
