// Packing as float, and what all packing shares; see pack.h.
#pragma once

#include <utility>

#include "cpu/convert.h"

namespace flash_attn_plus::cpu::FAP_ISA {

template <int kStep, bool kUpper, typename V, size_t... kIndex>
FAP_INLINE V merge_lanes(V a, V b, std::index_sequence<kIndex...>) {
  constexpr int n = kLanes, s = kStep;
  if constexpr (kUpper) {
    return __builtin_shufflevector(a, b,
                                   ((int(kIndex) & s) ? n + int(kIndex) : int(kIndex) + s)...);
  } else {
    return __builtin_shufflevector(a, b,
                                   ((int(kIndex) & s) ? n + int(kIndex) - s : int(kIndex))...);
  }
}

// Exchanges the off-diagonal halves of blocks of 2 * kStep rows.
template <int kStep, typename V>
FAP_INLINE void transpose_step(V (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const V a = v[i], b = v[i + kStep];
    v[i] = merge_lanes<kStep, false>(a, b, std::make_index_sequence<kLanes>());
    v[i + kStep] = merge_lanes<kStep, true>(a, b, std::make_index_sequence<kLanes>());
  }
}

// A square of kLanes x kLanes.
template <typename V>
FAP_INLINE void transpose(V (&v)[kLanes]) {
  if constexpr (kLanes > 8) transpose_step<kLanes / 2>(v);
  if constexpr (kLanes > 4) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// NaN in a lane that has seen inf or NaN, else 0.
FAP_INLINE Vec probe_finite(Vec x, Vec probe) { return fma(x, Vec{}, probe); }
FAP_INLINE bool all_finite(Vec probe) { return !any(probe != probe); }

// Elements [x, x + kLanes) of a row of d.
template <typename T>
FAP_INLINE Vec load_row(const T* row, int64_t x, int64_t d) {
  if (row == nullptr || x >= d) return Vec{};
  return x + kLanes <= d ? load_float(row + x)
                         : load_float_partial(row + x, static_cast<int>(d - x));
}

// dst (n, stride), zero from d on up to `width`, a multiple of kLanes.
template <typename T>
FAP_NOINLINE inline bool pack_rows(const T* const* rows, int n, int64_t d, int64_t width,
                                   float* dst, int64_t stride) {
  Vec probe{};
  for (int i = 0; i < n; ++i) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Vec v = load_row(rows[i], x, d);
      probe = probe_finite(v, probe);
      store(dst + i * stride + x, v);
    }
  }
  return all_finite(probe);
}

// dst (d, stride), zero from column n on up to `width`, a multiple of kLanes.
template <typename T>
FAP_NOINLINE inline bool pack_columns(const T* const* rows, int n, int64_t d, int width, float* dst,
                                      int64_t stride) {
  Vec probe{};
  for (int i = 0; i < width; i += kLanes) {
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        v[j] = i + j < n ? load_row(rows[i + j], x, d) : Vec{};
        probe = probe_finite(v[j], probe);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (x + j < d) store(dst + (x + j) * stride + i, v[j]);
      }
    }
  }
  return all_finite(probe);
}

// Row i of the result is column i of src (d, stride), i < n; null rows are skipped.
template <typename T>
FAP_NOINLINE inline void unpack_columns(const float* src, int64_t stride, int n, int64_t d,
                                        T* const* rows) {
  for (int i = 0; i < n; i += kLanes) {
    for (int64_t x = 0; x < d; x += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) v[j] = x + j < d ? load(src + (x + j) * stride + i) : Vec{};
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (i + j >= n || rows[i + j] == nullptr) continue;
        T* row = rows[i + j] + x;
        if (x + kLanes <= d) {
          store_float(row, v[j]);
        } else {
          store_float_partial(row, v[j], static_cast<int>(d - x));
        }
      }
    }
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
