// Rows in memory, for the operations that only move them: addresses, and how much is worth a task.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/params.h"

namespace flash_attn_plus::cpu {

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const void* offset_by(const void* data, int64_t bytes) {
  return static_cast<const char*>(data) + bytes;
}

// Head 0 of a row; size: bytes of an element.
inline void* row_at(const Operand& x, int64_t size, int64_t batch, int64_t row) {
  return static_cast<char*>(x.data) + (batch * x.batch_stride + row * x.row_stride) * size;
}

// Handing out a task and waking a thread cost microseconds, in which a core moves some 10 KB.
constexpr int64_t kTaskBytes = 64 << 10;

constexpr int64_t rows_per_task(int64_t row_bytes) {
  return std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, row_bytes));
}

// The threads that so many bytes are worth; requested as num_threads, 0 being all cores.
constexpr int threads_for(int requested, int64_t bytes) {
  return bytes <= 4 * kTaskBytes ? 1 : requested;
}

}  // namespace flash_attn_plus::cpu
