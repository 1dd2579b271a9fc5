// From a Spec's names to machine code.
#pragma once

#include <string>
#include <vector>

#include "cuda/runtime/embedded.h"
#include "cuda/runtime/kernel_table.h"
#include "cuda/runtime/nvrtc.h"

namespace flash_attn_plus::cuda {

// A translation unit and the headers that it can reach.
struct Program {
  std::string name;  // the Spec
  std::string text;
  std::vector<EmbeddedText> headers;
};
Program make_program(const KernelSource& source);

// What to compile for, given what the compiler knows: the architecture itself; else machine code
// of an older one of the same major version, which runs there too; else PTX of the newest, which
// the driver compiles.
struct Target {
  int arch = 0;
  bool ptx = false;
  std::string option() const;  // "sm_90" or "compute_90"
};
Target target_for(int arch, const std::vector<int>& supported);

// The options besides the target.
const std::vector<std::string>& compile_options();

struct Compilation {
  std::string image;
  std::string log;  // ptxas's report of registers, stack and shared memory included
  double seconds = 0;
};
// Throws Error with the compiler's log.
Compilation compile(const Nvrtc& nvrtc, const Program& program, const Target& target);

}  // namespace flash_attn_plus::cuda
