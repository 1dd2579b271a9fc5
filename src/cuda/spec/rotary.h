// The specialisations and arguments of the kernels that move rows: rotary embedding and the append
// to a cache.
#pragma once

#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

constexpr int kRowThreads = 256;

// Numbers that a thread reads or writes at once: 16 bytes of them, or one.
FAP_SHARED constexpr int row_width(DType dtype, bool vector) {
  return !vector ? 1 : dtype == DType::kFloat32 ? 4 : 8;
}

struct RotarySpec {
  static constexpr const char* kKernel = "sm80/rotary";
  static constexpr const char* kEntry = "rotary_embedding";

  DType dtype = DType::kBFloat16;
  DType table_dtype = DType::kBFloat16;  // dtype or float32
  bool interleaved = false;
  bool vector = true;  // all rows, and the parts of a row, are aligned to 16 bytes

  FAP_SHARED constexpr int width() const { return row_width(dtype, vector); }

  constexpr bool operator==(const RotarySpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("table_dtype", table_dtype);
    field("interleaved", interleaved);
    field("vector", vector);
  }
};

struct RotaryArgs {
  RotaryParams params;
  uint32_t rows_per_block = 1;
  uint32_t blocks_per_sequence = 1;
};

struct AppendSpec {
  static constexpr const char* kKernel = "sm80/append";
  static constexpr const char* kEntry = "append_to_cache";

  DType dtype = DType::kBFloat16;
  bool rotates = false;
  bool interleaved = false;
  bool vector = true;

  FAP_SHARED constexpr int width() const { return row_width(dtype, vector); }

  constexpr bool operator==(const AppendSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("rotates", rotates);
    field("interleaved", interleaved);
    field("vector", vector);
  }
};

struct AppendArgs {
  AppendParams params;
  // Blocks of threads of a sequence: first those of new keys, then as many of new values, then
  // those of queries.
  uint32_t new_rows_per_block = 1, new_blocks = 0;
  uint32_t q_rows_per_block = 1, q_blocks = 0;
};

}  // namespace flash_attn_plus::cuda
