// From a Spec to a launch, on a driver that has no GPU.
#include "cuda/runtime/kernel.h"

#include <thread>
#include <vector>

#include "cuda/fixture.h"
#include "cuda/runtime/device.h"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {
namespace {

class KernelTest : public CompilingTest {};

// Kernels stay loaded for the life of the process, so every test has one of its own.
constexpr RotarySpec kLaunched{.dtype = DType::kFloat16, .table_dtype = DType::kFloat16};
constexpr RotarySpec kShared{.dtype = DType::kFloat32, .table_dtype = DType::kFloat32};
constexpr RotarySpec kFailing{.interleaved = true};

TEST_F(KernelTest, IsCompiledOnceAndLaunchedWithItsShape) {
  const DeviceProperties& device = device_properties(1);
  EXPECT_EQ(device.arch, 90);
  EXPECT_EQ(device.num_multiprocessors, 132);
  const DeviceGuard guard(1);
  const int libraries = state().libraries;
  const Kernel& kernel = kernel_for(kLaunched, device);
  EXPECT_EQ(num_files(), 1u);
  EXPECT_EQ(&kernel_for(kLaunched, device), &kernel);
  EXPECT_EQ(state().libraries, libraries + 1);
  int stream = 0, args = 0;
  launch(kernel, {12, 256, 1000}, &stream, &args);
  const FakeDriverState seen = state();
  EXPECT_EQ(seen.device, 1);
  EXPECT_EQ(seen.blocks, 12u);
  EXPECT_EQ(seen.threads, 256u);
  EXPECT_EQ(seen.shared_bytes, 1000u);
  EXPECT_EQ(seen.stream, &stream);
  EXPECT_STREQ(seen.entry, RotarySpec::kEntry);
}

TEST_F(KernelTest, IsCompiledOnceByManyThreads) {
  const DeviceProperties& device = device_properties(0);
  const int libraries = state().libraries;
  std::vector<std::thread> threads;
  std::vector<const Kernel*> kernels(8);
  for (const Kernel*& kernel : kernels) {
    threads.emplace_back([&] {
      const DeviceGuard guard(0);
      kernel = &kernel_for(kShared, device);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Kernel* kernel : kernels) EXPECT_EQ(kernel, kernels[0]);
  EXPECT_EQ(state().libraries, libraries + 1);
}

TEST_F(KernelTest, FailuresNameTheCallTheSpecAndTheLaunch) {
  const DeviceProperties& device = device_properties(0);
  const DeviceGuard guard(0);
  const int libraries = state().libraries;
  fail_next("cuLibraryLoadData", 2);
  const std::string error = error_of([&] { kernel_for(kFailing, device); });
  EXPECT_NE(error.find("cuLibraryLoadData failed with CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos)
      << error;
  EXPECT_NE(error.find("RotarySpec{.dtype = DType::k"), std::string::npos) << error;
  fail_next("cuKernelSetAttribute", 1);
  EXPECT_NE(error_of([&] { kernel_for(kFailing, device); }), "");
  EXPECT_EQ(state().libraries, libraries);

  // The cause is gone, and so is the failure.
  const Kernel& kernel = kernel_for(kFailing, device);
  fail_next("cuLaunchKernel", 1);
  int args = 0;
  const std::string launch_error = error_of([&] { launch(kernel, {7, 96, 512}, nullptr, &args); });
  for (const char* part : {"cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE", "RotarySpec{",
                           "device 0 (Fake GPU, sm_90)", "7 blocks of 96 threads", "512 bytes"}) {
    EXPECT_NE(launch_error.find(part), std::string::npos) << part << " in " << launch_error;
  }
  launch(kernel, {7, 96, 512}, nullptr, &args);
}

TEST_F(KernelTest, LaunchesOfNoBlocksDoNothingAndOfTooManyAreRefused) {
  const DeviceGuard guard(0);
  const Kernel kernel{nullptr, "the kernel"};
  const int before = state().launches;
  launch(kernel, {0, 32, 0}, nullptr, nullptr);
  EXPECT_EQ(state().launches, before);
  EXPECT_NE(error_of([&] {
              launch(kernel, {int64_t{1} << 31, 32, 0}, nullptr, nullptr);
            }).find("2147483648 blocks"),
            std::string::npos);
}

TEST_F(KernelTest, GuardsNestAndLeaveWhatWasThere) {
  EXPECT_EQ(contexts(), 0);
  {
    const DeviceGuard outer(0);
    EXPECT_EQ(contexts(), 1);
    {
      const DeviceGuard same(0);
      EXPECT_EQ(contexts(), 1);
      const DeviceGuard other(1);
      EXPECT_EQ(contexts(), 2);
    }
    EXPECT_EQ(contexts(), 1);
  }
  EXPECT_EQ(contexts(), 0);
}

TEST_F(KernelTest, RecordersKeepLaunchesFromTheDriver) {
  const int launches = state().launches;
  LaunchRecorder recorder;
  const Kernel& kernel = kernel_for(RotarySpec{.vector = false}, typical_device(80));
  launch(kernel, {5, 64, 128}, nullptr, nullptr);
  launch(kernel, {0, 64, 128}, nullptr, nullptr);
  set_zero(&recorder, sizeof recorder, nullptr);
  EXPECT_EQ(state().launches, launches);
  ASSERT_EQ(recorder.launches().size(), 1u);
  EXPECT_EQ(recorder.launches()[0].kernel, to_text(RotarySpec{.vector = false}));
  EXPECT_EQ(recorder.launches()[0].blocks, 5);
}

TEST_F(KernelTest, MissingDevicesAreNamed) {
  EXPECT_NE(error_of([] { device_properties(7); }).find("there is no CUDA device 7"),
            std::string::npos);
}

}  // namespace
}  // namespace flash_attn_plus::cuda
