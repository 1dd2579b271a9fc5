// Compiled once per instruction set, FAP_ISA being its name; see CMakeLists.txt.
#include "cpu/kernels.h"

#include "cpu/backward_kernel.h"
#include "cpu/forward_kernel.h"
#include "cpu/rotary_kernel.h"

namespace flash_attn_plus::cpu::FAP_ISA {

const Kernels& kernels();
const Kernels& kernels() {
  static constexpr Kernels table = {&forward, &backward, &rotate};
  return table;
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
