// What one instruction set offers. kernels.cpp is compiled once per instruction set and defines
// kernels() in the namespace of that name; dispatch.cpp chooses among them.
#pragma once

#include "attention/params.h"
#include "cpu/rotary_rows.h"

namespace flash_attn_plus::cpu {

struct Kernels {
  void (*forward)(const ForwardParams& params);
  void (*backward)(const BackwardParams& params);
  void (*rotate)(const RotaryRows& rows);
};

// Those of the selected instruction set.
const Kernels& selected_kernels();

}  // namespace flash_attn_plus::cpu
