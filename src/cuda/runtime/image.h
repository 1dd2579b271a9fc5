// The machine code of a kernel: from the disk, else compiled and written there.
#pragma once

#include "cuda/runtime/compile.h"
#include "cuda/runtime/kernel_table.h"

namespace flash_attn_plus::cuda {

struct Image {
  Compilation compilation;
  bool from_disk = false;
  bool kept = true;  // on the disk now
};

// Needs no GPU. Throws Error when it is not on the disk and cannot be compiled.
Image image_for(const KernelSource& source, int arch);

}  // namespace flash_attn_plus::cuda
