#include "cuda/runtime/device.h"

#include <map>
#include <mutex>

#include "attention/error.h"
#include "cuda/runtime/driver.h"

namespace flash_attn_plus::cuda {
namespace {

// A block may use 1 kB less than a multiprocessor has.
DeviceProperties typical(int arch, int num_multiprocessors, int shared_kb, int threads,
                         int64_t l2_mb) {
  DeviceProperties device;
  device.ordinal = -arch;
  device.arch = arch;
  device.num_multiprocessors = num_multiprocessors;
  device.max_shared_per_block = (shared_kb - 1) * 1024;
  device.shared_per_multiprocessor = shared_kb * 1024;
  device.threads_per_multiprocessor = threads;
  device.l2_bytes = l2_mb << 20;
  return device;
}

const std::map<int, DeviceProperties>& typical_devices() {
  static const std::map<int, DeviceProperties> devices = [] {
    std::map<int, DeviceProperties> devices;
    for (const DeviceProperties& device : {
             typical(80, 108, 164, 2048, 40),    // A100
             typical(86, 84, 100, 1536, 6),      // RTX A6000
             typical(87, 16, 164, 1536, 4),      // Jetson AGX Orin
             typical(89, 128, 100, 1536, 72),    // RTX 4090
             typical(90, 132, 228, 2048, 50),    // H100, H200
             typical(100, 148, 228, 2048, 126),  // B200
             typical(103, 148, 228, 2048, 126),  // B300
             typical(110, 20, 228, 1536, 32),    // Jetson Thor
             typical(120, 170, 100, 1536, 96),   // RTX 5090
             typical(121, 48, 100, 1536, 24),    // GB10
         }) {
      devices[device.arch] = device;
      devices[device.arch].name = "sm_" + std::to_string(device.arch);
    }
    return devices;
  }();
  return devices;
}

DeviceProperties read_properties(int ordinal) {
  if (ordinal < 0) return typical_device(-ordinal);
  const Driver& cuda = driver();
  int device = 0, count = 0;
  if (cuda.device(&device, ordinal) != kDriverSuccess) {
    check_driver(cuda, cuda.device_count(&count), "cuDeviceGetCount");
    fail("there is no CUDA device ", ordinal, ": this process sees ", count);
  }
  const auto attribute = [&](DeviceAttribute which) {
    int value = 0;
    check_driver(cuda, cuda.device_attribute(&value, which, device), "cuDeviceGetAttribute",
                 " on device ", ordinal);
    return value;
  };
  DeviceProperties properties;
  char name[256] = "";
  check_driver(cuda, cuda.device_name(name, sizeof name, device), "cuDeviceGetName");
  properties.name = name;
  properties.ordinal = ordinal;
  properties.arch = 10 * attribute(kComputeCapabilityMajor) + attribute(kComputeCapabilityMinor);
  if (properties.arch < kMinArch) {
    fail("FlashAttention only supports NVIDIA GPUs of compute capability 8.0 (Ampere) or newer, ",
         "but device ", ordinal, " (", name, ") has ", properties.arch / 10, ".",
         properties.arch % 10);
  }
  properties.num_multiprocessors = attribute(kMultiprocessorCount);
  properties.max_shared_per_block = attribute(kMaxSharedPerBlockOptin);
  properties.shared_per_multiprocessor = attribute(kMaxSharedPerMultiprocessor);
  properties.registers_per_multiprocessor = attribute(kMaxRegistersPerMultiprocessor);
  properties.threads_per_multiprocessor = attribute(kMaxThreadsPerMultiprocessor);
  properties.l2_bytes = attribute(kL2CacheSize);
  return properties;
}

// Retained for the life of the process: other libraries hold it as well, and a device that was used
// once will be used again.
void* primary_context(int ordinal) {
  static std::mutex mutex;
  static std::map<int, void*> contexts;
  const std::lock_guard lock(mutex);
  void*& context = contexts[ordinal];
  if (context == nullptr) {
    const Driver& cuda = driver();
    int device = 0;
    check_driver(cuda, cuda.device(&device, ordinal), "cuDeviceGet", " for device ", ordinal);
    check_driver(cuda, cuda.retain_primary_context(&context, device), "cuDevicePrimaryCtxRetain",
                 " on device ", ordinal);
  }
  return context;
}

}  // namespace

const DeviceProperties& device_properties(int ordinal) {
  static std::mutex mutex;
  static auto& devices = *new std::map<int, DeviceProperties>;  // outlives every thread
  const std::lock_guard lock(mutex);
  const auto found = devices.find(ordinal);
  if (found != devices.end()) return found->second;
  return devices.emplace(ordinal, read_properties(ordinal)).first->second;
}

DeviceProperties typical_device(int arch) {
  const auto found = typical_devices().find(arch);
  if (found != typical_devices().end()) return found->second;
  std::string known;
  for (const int each : known_architectures()) known += " sm_" + std::to_string(each);
  fail("the architecture must be one of", known, ", but is sm_", arch);
}

const std::vector<int>& known_architectures() {
  static const std::vector<int> architectures = [] {
    std::vector<int> architectures;
    for (const auto& [arch, device] : typical_devices()) architectures.push_back(arch);
    return architectures;
  }();
  return architectures;
}

DeviceGuard::DeviceGuard(int ordinal) {
  const Driver& cuda = driver();
  int current = -1;
  if (cuda.current_device(&current) == kDriverSuccess && current == ordinal) return;
  check_driver(cuda, cuda.push_context(primary_context(ordinal)), "cuCtxPushCurrent", " on device ",
               ordinal);
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  void* context = nullptr;
  if (pushed_) driver().pop_context(&context);
}

}  // namespace flash_attn_plus::cuda
