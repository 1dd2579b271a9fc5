// What one instruction set offers. kernels.cpp is compiled once per instruction set and defines
// kernels() in the namespace of that name; dispatch.cpp chooses among them.
#pragma once

#include "attention/params.h"

namespace flash_attn_plus::cpu {

struct Kernels {
  void (*forward)(const ForwardParams& params);
  void (*backward)(const BackwardParams& params);
};

}  // namespace flash_attn_plus::cpu
