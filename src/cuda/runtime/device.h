// What the runtime knows of a GPU, and the context that its calls run in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn_plus::cuda {

// The oldest GPUs that any family of kernels serves: compute capability 8.0.
constexpr int kMinArch = 80;

// What planners look at: plain numbers, so that a plan for any GPU can be made without one.
struct DeviceProperties {
  int ordinal = 0;  // as the driver and torch count
  int arch = 0;     // compute capability: 90 is 9.0
  int num_multiprocessors = 0;
  int max_shared_per_block = 0;  // bytes that one block may use
  int shared_per_multiprocessor =
      0;  // bytes; every resident block takes 1 kB more than it asks for
  int registers_per_multiprocessor = 65536;
  int threads_per_multiprocessor = 0;
  int64_t l2_bytes = 0;
  std::string name;
};

// Of a GPU in this machine; read once. Throws Error when there is no driver, no such device, or one
// older than kMinArch. A negative ordinal is no GPU but an architecture: -90 is typical_device(90).
const DeviceProperties& device_properties(int ordinal);

// Of the best-known GPU of an architecture: for plans, checks and compilations without a GPU.
// Throws Error for an architecture that is not in known_architectures().
DeviceProperties typical_device(int arch);

// 80, 86, 87, 89, 90, 100, 103, 110, 120, 121.
const std::vector<int>& known_architectures();

// Makes a context of the device current on this thread, and what was current before on leaving. A
// context of this device that is current already stays: it is the caller's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace flash_attn_plus::cuda
