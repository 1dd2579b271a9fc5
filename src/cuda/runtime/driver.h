// The CUDA driver, opened when it is first needed: the library loads on machines without one. The
// declarations are this project's own; they follow the driver's documented interface, which is the
// same in every version from 12.0 on.
#pragma once

#include <cstddef>
#include <string>

#include "attention/error.h"

namespace flash_attn_plus::cuda {

using DriverResult = int;  // CUresult
constexpr DriverResult kDriverSuccess = 0;

// CUdevice_attribute.
enum DeviceAttribute : int {
  kMultiprocessorCount = 16,
  kL2CacheSize = 38,
  kMaxThreadsPerMultiprocessor = 39,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedPerMultiprocessor = 81,
  kMaxRegistersPerMultiprocessor = 82,
  kMaxSharedPerBlockOptin = 97,
};

// CUfunction_attribute.
enum KernelAttribute : int {
  kStaticSharedBytes = 1,
  kMaxDynamicSharedBytes = 8,
};

// CUstreamCaptureMode.
enum CaptureMode : int { kCaptureRelaxed = 2 };

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute {
  int id;
  alignas(8) char value[64];
};
constexpr int kEarlyLaunch = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, an int
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// Contexts, streams, libraries and kernels are opaque.
struct Driver {
  DriverResult (*init)(unsigned flags);
  DriverResult (*version)(int* version);  // 13000 is 13.0
  DriverResult (*error_name)(DriverResult, const char**);
  DriverResult (*error_text)(DriverResult, const char**);
  DriverResult (*device_count)(int*);
  DriverResult (*device)(int* device, int ordinal);
  DriverResult (*device_name)(char* name, int length, int device);
  DriverResult (*device_attribute)(int* value, int attribute, int device);
  DriverResult (*retain_primary_context)(void** context, int device);
  DriverResult (*current_device)(int* device);
  DriverResult (*push_context)(void* context);
  DriverResult (*pop_context)(void** context);
  DriverResult (*load_library)(void** library, const void* image, int* options,
                               void** option_values, unsigned num_options, int* library_options,
                               void** library_option_values, unsigned num_library_options);
  DriverResult (*unload_library)(void* library);
  DriverResult (*library_kernel)(void** kernel, void* library, const char* name);
  DriverResult (*kernel_attribute)(int* value, int attribute, void* kernel, int device);
  DriverResult (*set_kernel_attribute)(int attribute, int value, void* kernel, int device);
  DriverResult (*kernel_function)(void** function, void* kernel);
  DriverResult (*launch)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                         unsigned block_x, unsigned block_y, unsigned block_z,
                         unsigned shared_bytes, void* stream, void** arguments, void** extra);
  // Null in a driver before 12.3, with which a graph cannot hold an early launch.
  DriverResult (*launch_config)(const LaunchConfig* config, void* kernel, void** arguments,
                                void** extra);
  DriverResult (*set_bytes)(void* pointer, unsigned char value, size_t count, void* stream);
  DriverResult (*exchange_capture_mode)(int* mode);
};

// Opened and initialised once; a failure throws Error, and the next call tries again.
const Driver& driver();

// "for CUDA 13.0, 8 devices". Throws Error without a driver.
std::string describe_driver();

// "CUDA_ERROR_INVALID_VALUE (invalid argument)"
std::string error_string(const Driver& driver, DriverResult result);

// Throws Error with the driver's name for a failure of `function`, and whatever else is given.
template <typename... Parts>
void check_driver(const Driver& driver, DriverResult result, const char* function,
                  const Parts&... parts) {
  if (result == kDriverSuccess) return;
  fail("CUDA: ", function, " failed with ", error_string(driver, result), parts...);
}

}  // namespace flash_attn_plus::cuda
