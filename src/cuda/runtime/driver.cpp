#include "cuda/runtime/driver.h"

#include <atomic>
#include <mutex>

#include "cuda/runtime/library.h"

namespace flash_attn_plus::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

void bind_all(void* library, Driver& driver) {
  const auto get = [&](auto& function, const char* name) {
    if (!bind(library, name, function)) {
      fail("flash_attn needs an NVIDIA driver for CUDA 12.0 or newer (version 525 or newer), but ",
           kLibrary, " has no function ", name, ": update the driver");
    }
  };
  get(driver.init, "cuInit");
  get(driver.version, "cuDriverGetVersion");
  get(driver.error_name, "cuGetErrorName");
  get(driver.error_text, "cuGetErrorString");
  get(driver.device_count, "cuDeviceGetCount");
  get(driver.device, "cuDeviceGet");
  get(driver.device_name, "cuDeviceGetName");
  get(driver.device_attribute, "cuDeviceGetAttribute");
  get(driver.retain_primary_context, "cuDevicePrimaryCtxRetain");
  get(driver.current_device, "cuCtxGetDevice");
  get(driver.push_context, "cuCtxPushCurrent_v2");
  get(driver.pop_context, "cuCtxPopCurrent_v2");
  get(driver.load_library, "cuLibraryLoadData");
  get(driver.unload_library, "cuLibraryUnload");
  get(driver.library_kernel, "cuLibraryGetKernel");
  get(driver.kernel_attribute, "cuKernelGetAttribute");
  get(driver.set_kernel_attribute, "cuKernelSetAttribute");
  get(driver.kernel_function, "cuKernelGetFunction");
  get(driver.launch, "cuLaunchKernel");
  int version = 0;
  driver.launch_config = nullptr;
  if (driver.version(&version) == kDriverSuccess && version >= 12030) {
    bind(library, "cuLaunchKernelEx", driver.launch_config);
  }
  get(driver.set_bytes, "cuMemsetD8Async");
  get(driver.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
}

Driver open() {
  std::string reason;
  void* library = open_library(kLibrary, reason);
  if (library == nullptr) {
    fail("flash_attn found no NVIDIA driver on this machine: ", kLibrary, " cannot be opened (",
         reason, "). Install the driver, or make it visible to this container.");
  }
  Driver driver;
  bind_all(library, driver);
  check_driver(driver, driver.init(0), "cuInit");
  return driver;
}

}  // namespace

const Driver& driver() {
  static std::atomic<const Driver*> opened = nullptr;
  static std::mutex mutex;
  if (const Driver* found = opened.load(std::memory_order_acquire)) return *found;
  const std::lock_guard lock(mutex);
  if (opened.load() == nullptr) opened = new Driver(open());
  return *opened.load();
}

std::string describe_driver() {
  const Driver& cuda = driver();
  int version = 0, count = 0;
  check_driver(cuda, cuda.version(&version), "cuDriverGetVersion");
  check_driver(cuda, cuda.device_count(&count), "cuDeviceGetCount");
  return "for CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
         ", " + std::to_string(count) + (count == 1 ? " device" : " devices");
}

std::string error_string(const Driver& driver, DriverResult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.error_name(result, &name) != kDriverSuccess || name == nullptr) {
    return "error " + std::to_string(result);
  }
  if (driver.error_text(result, &text) != kDriverSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

}  // namespace flash_attn_plus::cuda
