#include "cuda/runtime/kernel.h"

#include <limits>

#include "attention/error.h"
#include "cuda/runtime/driver.h"
#include "cuda/runtime/image.h"
#include "cuda/runtime/log.h"

namespace flash_attn_plus::cuda {
namespace {

// A kernel may be needed for the first time while the thread captures a graph; loading one does
// nothing that the graph would have to repeat.
class CapturePause {
 public:
  explicit CapturePause(const Driver& cuda) : cuda_(cuda) { cuda_.exchange_capture_mode(&mode_); }
  ~CapturePause() { cuda_.exchange_capture_mode(&mode_); }
  CapturePause(const CapturePause&) = delete;
  CapturePause& operator=(const CapturePause&) = delete;

 private:
  const Driver& cuda_;
  int mode_ = kCaptureRelaxed;
};

Kernel load(const std::string& image, const KernelSource& source, const DeviceProperties& device) {
  const Driver& cuda = driver();
  const CapturePause pause(cuda);
  Kernel kernel;
  kernel.name = source.spec + " on device " + std::to_string(device.ordinal) + " (" + device.name +
                ", sm_" + std::to_string(device.arch) + ")";
  void* library = nullptr;
  check_driver(cuda,
               cuda.load_library(&library, image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
               "cuLibraryLoadData", " for ", kernel.name);
  try {
    check_driver(cuda, cuda.library_kernel(&kernel.handle, library, source.entry),
                 "cuLibraryGetKernel", " for ", source.entry, " of ", kernel.name);
    int fixed = 0;
    check_driver(cuda,
                 cuda.kernel_attribute(&fixed, kStaticSharedBytes, kernel.handle, device.ordinal),
                 "cuKernelGetAttribute", " for ", kernel.name);
    check_driver(
        cuda,
        cuda.set_kernel_attribute(kMaxDynamicSharedBytes, device.max_shared_per_block - fixed,
                                  kernel.handle, device.ordinal),
        "cuKernelSetAttribute", " for ", kernel.name);
    // Loads it into the context now, not within the first launch, which may be captured.
    void* function = nullptr;
    check_driver(cuda, cuda.kernel_function(&function, kernel.handle), "cuKernelGetFunction",
                 " for ", kernel.name);
  } catch (...) {
    cuda.unload_library(library);
    throw;
  }
  return kernel;
}

}  // namespace

Kernel load_kernel(const KernelSource& source, const DeviceProperties& device) {
  return load(image_for(source, device.arch).compilation.image, source, device);
}

void launch(const Kernel& kernel, const LaunchShape& shape, void* stream, const void* args) {
  if (shape.blocks == 0) return;
  if (LaunchRecorder* recorder = LaunchRecorder::current()) {
    recorder->add({kernel.name, shape.blocks, shape.threads, shape.shared_bytes});
    return;
  }
  if (shape.blocks < 0 || shape.blocks > std::numeric_limits<int32_t>::max()) {
    fail("the call needs ", shape.blocks,
         " blocks of threads, more than a launch can have (2^31 - 1): ", kernel.name);
  }
  if (logging()) {
    log("launch " + kernel.name + ": " + std::to_string(shape.blocks) + " blocks of " +
        std::to_string(shape.threads) + " threads, " + std::to_string(shape.shared_bytes) +
        " bytes of shared memory");
  }
  const Driver& cuda = driver();
  void* arguments[] = {const_cast<void*>(args)};
  const unsigned blocks = static_cast<unsigned>(shape.blocks);
  const unsigned threads = static_cast<unsigned>(shape.threads);
  const unsigned shared_bytes = static_cast<unsigned>(shape.shared_bytes);
  DriverResult result;
  if (shape.early && cuda.launch_config != nullptr) {
    LaunchAttribute attribute{kEarlyLaunch, {}};
    attribute.value[0] = 1;  // little-endian
    const LaunchConfig config{{blocks, 1, 1}, {threads, 1, 1}, shared_bytes, stream, &attribute, 1};
    result = cuda.launch_config(&config, kernel.handle, arguments, nullptr);
  } else {
    result = cuda.launch(kernel.handle, blocks, 1, 1, threads, 1, 1, shared_bytes, stream,
                         arguments, nullptr);
  }
  check_driver(cuda, result, "cuLaunchKernel", " for ", kernel.name, ", ", shape.blocks,
               " blocks of ", shape.threads, " threads with ", shape.shared_bytes,
               " bytes of shared memory");
}

void set_zero(void* pointer, size_t bytes, void* stream) {
  if (bytes == 0 || LaunchRecorder::current() != nullptr) return;
  const Driver& cuda = driver();
  check_driver(cuda, cuda.set_bytes(pointer, 0, bytes, stream), "cuMemsetD8Async", " for ", bytes,
               " bytes");
}

}  // namespace flash_attn_plus::cuda
