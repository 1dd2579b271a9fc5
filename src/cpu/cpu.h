// The CPU backend: what the core calls. Every function expects validated parameters, runs on the
// calling thread and on the workers of the pool, and returns when the result is written.
#pragma once

#include <string>
#include <vector>

#include "attention/params.h"

namespace flash_attn_plus::cpu {

void forward(const ForwardParams& params);
void backward(const BackwardParams& params);
void append(const AppendParams& params);
void rotary(const RotaryParams& params);

// Names of the instruction sets that this CPU can run, the best first; "portable" is always there.
const std::vector<std::string>& runnable_isas();

// The one in use: the best, or what FLASH_ATTN_PLUS_CPU_ISA names. Read once. Throws Error when the
// variable names an unknown one or one that this CPU cannot run.
const std::string& selected_isa();

}  // namespace flash_attn_plus::cpu
