// Rotary embedding of rows, in float32, rounded once.
//
// The tables of a row are widened once, to one number for each element: out[i] = x[i] * cos[i] +
// x[partner of i] * sin[i], where sin carries the sign. All heads of the row share them. Bound by
// memory.
#pragma once

#include <cstring>

#include "cpu/convert.h"
#include "cpu/rotary_rows.h"

namespace flash_attn_plus::cpu::FAP_ISA {

struct RotaryTable {
  alignas(64) float cos[kMaxHeadDim];
  alignas(64) float sin[kMaxHeadDim];
};

// Rows of the tables as they are, (rotary_dim / 2), or interleaved: every cosine twice, and every
// sine as -sin, sin.
template <typename Table>
FAP_INLINE void fill_table(const Table* cos, const Table* sin, int64_t half, bool interleaved,
                           bool conjugate, RotaryTable& table) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = half - i < kLanes ? static_cast<int>(half - i) : kLanes;
    float c[kLanes], s[kLanes];
    store(c, n == kLanes ? load_float(cos + i) : load_float_partial(cos + i, n));
    const Vec sine = n == kLanes ? load_float(sin + i) : load_float_partial(sin + i, n);
    store(s, conjugate ? -sine : sine);
    if (interleaved) {
      for (int j = 0; j < n; ++j) {
        table.cos[2 * (i + j)] = table.cos[2 * (i + j) + 1] = c[j];
        table.sin[2 * (i + j)] = -s[j];
        table.sin[2 * (i + j) + 1] = s[j];
      }
    } else {
      std::memcpy(table.cos + i, c, static_cast<size_t>(n) * sizeof(float));
      std::memcpy(table.sin + i, s, static_cast<size_t>(n) * sizeof(float));
    }
  }
}

// The other number of each pair (2i, 2i + 1).
FAP_INLINE Vec swap_pairs(Vec x) {
  VecI partner = lane_index() ^ 1;
  return __builtin_shuffle(x, partner);
}

template <typename T>
FAP_INLINE void rotate_interleaved(const T* x, T* out, int64_t rotary_dim,
                                   const RotaryTable& table) {
  int64_t i = 0;
  for (; i + kLanes <= rotary_dim; i += kLanes) {
    const Vec value = load_float(x + i);
    store_float(out + i, fma(swap_pairs(value), load(table.sin + i), value * load(table.cos + i)));
  }
  if (i < rotary_dim) {
    const int n = static_cast<int>(rotary_dim - i);
    const Vec value = load_float_partial(x + i, n);
    const Vec cos = load_partial(table.cos + i, n), sin = load_partial(table.sin + i, n);
    store_float_partial(out + i, fma(swap_pairs(value), sin, value * cos), n);
  }
}

template <typename T>
FAP_INLINE void rotate_halves(const T* x, T* out, int64_t half, const RotaryTable& table) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = load_float(x + i), second = load_float(x + half + i);
    const Vec cos = load(table.cos + i), sin = load(table.sin + i);
    store_float(out + i, first * cos - second * sin);
    store_float(out + half + i, first * sin + second * cos);
  }
  if (i < half) {
    const int n = static_cast<int>(half - i);
    const Vec first = load_float_partial(x + i, n), second = load_float_partial(x + half + i, n);
    const Vec cos = load_partial(table.cos + i, n), sin = load_partial(table.sin + i, n);
    store_float_partial(out + i, first * cos - second * sin, n);
    store_float_partial(out + half + i, first * sin + second * cos, n);
  }
}

template <typename T, typename Table>
void rotate_rows(const RotaryRows& rows) {
  RotaryTable table;
  const int64_t half = rows.rotary_dim / 2;
  const int64_t rest = rows.head_dim - rows.rotary_dim;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    fill_table(static_cast<const Table*>(rows.cos) + row * rows.cos_stride,
               static_cast<const Table*>(rows.sin) + row * rows.sin_stride, half, rows.interleaved,
               rows.conjugate, table);
    for (int64_t head = 0; head < rows.num_heads; ++head) {
      const T* x =
          static_cast<const T*>(rows.x) + row * rows.x_row_stride + head * rows.x_head_stride;
      T* out = static_cast<T*>(rows.out) + row * rows.out_row_stride + head * rows.out_head_stride;
      if (rows.interleaved) {
        rotate_interleaved(x, out, rows.rotary_dim, table);
      } else {
        rotate_halves(x, out, half, table);
      }
      if (x != out && rest > 0) {
        std::memcpy(out + rows.rotary_dim, x + rows.rotary_dim,
                    static_cast<size_t>(rest) * sizeof(T));
      }
    }
  }
}

template <typename T>
void rotate_rows(const RotaryRows& rows) {
  if (rows.table_dtype == DType::kFloat32) {
    rotate_rows<T, float>(rows);
  } else {
    rotate_rows<T, T>(rows);
  }
}

void rotate(const RotaryRows& rows);
void rotate(const RotaryRows& rows) {
  switch (rows.dtype) {
    case DType::kFloat32:
      return rotate_rows<float>(rows);
    case DType::kFloat16:
      return rotate_rows<Half>(rows);
    case DType::kBFloat16:
      return rotate_rows<BFloat16>(rows);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
