// Every kernel that the planners can choose, as the planners themselves enumerate them; for filling
// a cache ahead and for checks of everything that can be compiled.
#pragma once

#include <string>
#include <vector>

#include "cuda/runtime/compile.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel_table.h"

namespace flash_attn_plus::cuda {

// What a kernel may use. A Spec says more with max_registers(), max_stack_bytes(),
// max_spill_bytes(); without these nothing is spilled and the stack is empty.
struct KernelLimits {
  int registers = 255;
  int stack_bytes = 0;
  int spill_bytes = 0;
  int shared_bytes = 0;  // what it asks for at its launch
};

struct CatalogEntry {
  KernelSource source;
  KernelLimits limits;
};

std::vector<CatalogEntry> all_kernels(const DeviceProperties& device);

// What ptxas says of a kernel in the log of its compilation.
struct KernelUse {
  int registers = 0;
  int stack_bytes = 0;
  int spill_bytes = 0;   // stored
  int shared_bytes = 0;  // of fixed size
};
KernelUse use_of(const std::string& log);

// What breaks the limits, or the device's; empty when nothing does.
std::string excess(const KernelUse& use, const KernelLimits& limits,
                   const DeviceProperties& device);

}  // namespace flash_attn_plus::cuda
