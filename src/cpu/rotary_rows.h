// Rotary embedding of consecutive rows of one sequence: what rotary() and append() are made of, and
// what each instruction set implements.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace flash_attn_plus::cpu {

// x and out: (num_rows, num_heads, head_dim) in dtype; out may be x, with the same strides, and
// else does not overlap it.
struct RotaryRows {
  DType dtype = DType::kFloat32;
  DType table_dtype = DType::kFloat32;
  int64_t num_rows = 0, num_heads = 0, head_dim = 0;
  const void* x = nullptr;
  int64_t x_row_stride = 0, x_head_stride = 0;
  void* out = nullptr;
  int64_t out_row_stride = 0, out_head_stride = 0;
  const void* cos = nullptr;  // of the first row: (num_rows, rotary_dim / 2) in table_dtype
  const void* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;  // of a row; 0: all rows at the same position
  int64_t rotary_dim = 0;                  // even, at most head_dim
  bool interleaved = false;
  bool conjugate = false;
};

}  // namespace flash_attn_plus::cpu
