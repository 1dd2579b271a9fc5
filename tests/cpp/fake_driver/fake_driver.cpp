// A CUDA driver without a GPU, for tests of everything that happens on the host: it says that there
// are GPUs, takes cubins, and writes launches down instead of running them. Loaded by its path
// before the driver is needed, it is what the name libcuda.so.1 finds.
//
// FAKE_CUDA_ARCH sets the compute capability (90), FAKE_CUDA_DEVICES their number (2).
#include "fake_driver/fake_driver.h"

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

std::mutex mutex;
FakeDriverState state;
int failure_result = 0;
std::string failing_function;
std::vector<std::unique_ptr<std::string>> kernels;
int context_of_device[16];
thread_local std::vector<void*> contexts;

int number(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

// The result that a test asked for of this function, once.
int result_of(const char* function) {
  const std::lock_guard lock(mutex);
  if (failing_function != function) return 0;
  failing_function.clear();
  return failure_result;
}

constexpr int kInvalidContext = 201, kInvalidDevice = 101, kInvalidValue = 1, kInvalidImage = 200;

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default"))) int

FAKE cuInit(unsigned) { return result_of("cuInit"); }
FAKE cuDriverGetVersion(int* version) {
  *version = number("FAKE_CUDA_VERSION", 13000);
  return 0;
}
FAKE cuGetErrorName(int result, const char** name) {
  static const std::map<int, const char*> names = {{1, "CUDA_ERROR_INVALID_VALUE"},
                                                   {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                   {100, "CUDA_ERROR_NO_DEVICE"},
                                                   {200, "CUDA_ERROR_INVALID_IMAGE"},
                                                   {201, "CUDA_ERROR_INVALID_CONTEXT"}};
  const auto found = names.find(result);
  if (found == names.end()) return kInvalidValue;
  *name = found->second;
  return 0;
}
FAKE cuGetErrorString(int, const char** text) {
  *text = "as the test asked for";
  return 0;
}
FAKE cuDeviceGetCount(int* count) {
  *count = number("FAKE_CUDA_DEVICES", 2);
  return 0;
}
FAKE cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= number("FAKE_CUDA_DEVICES", 2)) return kInvalidDevice;
  *device = ordinal;
  return 0;
}
FAKE cuDeviceGetName(char* name, int length, int) {
  std::strncpy(name, "Fake GPU", static_cast<size_t>(length));
  return 0;
}
FAKE cuDeviceGetAttribute(int* value, int attribute, int) {
  const int arch = number("FAKE_CUDA_ARCH", 90);
  switch (attribute) {
    case 16:
      *value = 132;
      break;
    case 38:
      *value = 50 << 20;
      break;
    case 39:
      *value = 2048;
      break;
    case 75:
      *value = arch / 10;
      break;
    case 76:
      *value = arch % 10;
      break;
    case 81:
      *value = 228 * 1024;
      break;
    case 82:
      *value = 65536;
      break;
    case 97:
      *value = 227 * 1024;
      break;
    default:
      return kInvalidValue;
  }
  return 0;
}
FAKE cuDevicePrimaryCtxRetain(void** context, int device) {
  context_of_device[device] = device;
  *context = &context_of_device[device];
  return result_of("cuDevicePrimaryCtxRetain");
}
FAKE cuCtxGetDevice(int* device) {
  if (contexts.empty()) return kInvalidContext;
  *device = *static_cast<int*>(contexts.back());
  return 0;
}
FAKE cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}
FAKE cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kInvalidContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}
FAKE cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**,
                       unsigned) {
  if (const int result = result_of("cuLibraryLoadData")) return result;
  const char* text = static_cast<const char*>(image);
  const bool elf = std::memcmp(text,
                               "\x7f"
                               "ELF",
                               4) == 0;
  if (!elf && std::memcmp(text, "//", 2) != 0) return kInvalidImage;
  const std::lock_guard lock(mutex);
  *library = kernels.emplace_back(new std::string).get();
  ++state.libraries;
  return 0;
}
FAKE cuLibraryUnload(void*) {
  const std::lock_guard lock(mutex);
  --state.libraries;
  return 0;
}
FAKE cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  *static_cast<std::string*>(library) = name;
  *kernel = library;
  return result_of("cuLibraryGetKernel");
}
FAKE cuKernelGetAttribute(int* value, int, void*, int) {
  *value = 0;
  return 0;
}
FAKE cuKernelSetAttribute(int, int, void*, int) { return result_of("cuKernelSetAttribute"); }
FAKE cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return contexts.empty() ? kInvalidContext : 0;
}
FAKE cuLaunchKernel(void* kernel, unsigned x, unsigned, unsigned, unsigned threads, unsigned,
                    unsigned, unsigned shared, void* stream, void**, void**) {
  if (contexts.empty()) return kInvalidContext;
  if (const int result = result_of("cuLaunchKernel")) return result;
  const std::lock_guard lock(mutex);
  ++state.launches;
  state.device = *static_cast<int*>(contexts.back());
  state.blocks = x;
  state.threads = threads;
  state.shared_bytes = shared;
  state.stream = stream;
  std::strncpy(state.entry, static_cast<std::string*>(kernel)->c_str(), sizeof state.entry - 1);
  return 0;
}
FAKE cuMemsetD8Async(void*, unsigned char, size_t, void*) { return contexts.empty() ? 201 : 0; }
// NVRTC asks the driver for a table of functions; one that holds its own size alone is empty.
FAKE cuGetExportTable(const void** table, const void*) {
  static const size_t empty[1] = {sizeof empty};
  *table = empty;
  return 0;
}
FAKE cuThreadExchangeStreamCaptureMode(int*) { return 0; }

extern "C" __attribute__((visibility("default"))) FakeDriverState fake_driver_state() {
  const std::lock_guard lock(mutex);
  return state;
}
extern "C" __attribute__((visibility("default"))) void fake_driver_fail(const char* function,
                                                                        int result) {
  const std::lock_guard lock(mutex);
  failing_function = function;
  failure_result = result;
}
extern "C" __attribute__((visibility("default"))) int fake_driver_contexts() {
  return static_cast<int>(contexts.size());
}
