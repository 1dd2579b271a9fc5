// What of a call the choice of a kernel depends on, for the kernels of attention.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "attention/params.h"
#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

// The head dimensions that tiles have. Those in between take the next larger one.
inline constexpr int kTileHeadDims[] = {32, 48, 64, 80, 96, 128, 160, 192, 224, 256};

int tile_head_dim(int64_t head_dim);

// How the rows of all operands can be accessed: the most that each of them allows.
Access common_access(int64_t head_dim, std::initializer_list<const Operand*> operands);

Masking masking_of(const AttentionParams& params);

}  // namespace flash_attn_plus::cuda
