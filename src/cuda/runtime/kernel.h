// From a Spec to a kernel that can be launched.
//
// A Spec is a plain struct of ints, bools and enums with
//   template <typename F> constexpr void visit(F&& field) const { field("head_dim", head_dim); ...
//   }
// that names its fields in the order of their declaration, a defaulted operator==, and
//   static constexpr const char* kKernel = "sm80/forward";  // cuda/kernels/sm80/forward.cuh
//   static constexpr const char* kEntry = "forward";        // the extern "C" __global__ function
// All of cuda/spec/*.h is included above the kernel, then comes `constexpr <Spec> spec{...};`, then
// the kernel's file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel_table.h"
#include "cuda/runtime/recorder.h"
#include "cuda/runtime/spec_text.h"

namespace flash_attn_plus::cuda {

// The kernel of this Spec for this device: from memory, else from the disk, else compiled. Lives as
// long as the process. The context of the device must be current.
template <typename Spec>
const Kernel& kernel_for(const Spec& spec, const DeviceProperties& device) {
  if (LaunchRecorder* recorder = LaunchRecorder::current()) return recorder->kernel(to_text(spec));
  static KernelTable<Spec>& table = *new KernelTable<Spec>;  // outlives every thread
  return table.find(spec, device);
}

struct LaunchShape {
  int64_t blocks = 0;  // 0: nothing is launched; at most 2^31 - 1
  int threads = 0;
  int shared_bytes = 0;  // dynamic
  // From compute capability 9.0 on: starts before the stream's last kernel has ended, and waits for
  // its results by wait_for_previous_kernel().
  bool early = false;
};

// Launches in the current context. `args` is the kernel's one argument, a struct, which is copied.
void launch(const Kernel& kernel, const LaunchShape& shape, void* stream, const void* args);

// Sets bytes to 0 on the stream.
void set_zero(void* pointer, size_t bytes, void* stream);

}  // namespace flash_attn_plus::cuda
