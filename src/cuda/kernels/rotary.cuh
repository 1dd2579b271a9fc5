// Rotary embedding of one row of one head, in units of a few pairs: computed in float32, rounded
// once.
#pragma once

#include "cuda/kernels/ptx.cuh"

namespace flash_attn_plus::cuda {

template <DType kType>
struct NumberOf {
  using Type = uint16_t;
};
template <>
struct NumberOf<DType::kFloat32> {
  using Type = float;
};
template <DType kType>
using Number = typename NumberOf<kType>::Type;

// kWidth numbers as they lie in memory; moved by 16 bytes where they fill them.
template <DType kType, int kWidth>
struct Numbers {
  static constexpr int kBytes = kWidth * static_cast<int>(sizeof(Number<kType>));
  static constexpr int kVectors = kBytes / 16;
  union {
    Number<kType> number[kWidth];
    uint4 vector[kVectors > 0 ? kVectors : 1];
  };

  FAP_DEVICE Numbers() {}
  FAP_DEVICE explicit Numbers(const Number<kType>* source) {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) vector[i] = reinterpret_cast<const uint4*>(source)[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) number[i] = source[i];
    }
  }
  FAP_DEVICE void store(Number<kType>* destination) const {
    if constexpr (kVectors > 0) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(destination)[i] = vector[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) destination[i] = number[i];
    }
  }
  FAP_DEVICE float get(int i) const {
    if constexpr (kType == DType::kFloat32) {
      return number[i];
    } else {
      return unpack1<kType>(number[i]);
    }
  }
  FAP_DEVICE void set(int i, float x) {
    if constexpr (kType == DType::kFloat32) {
      number[i] = x;
    } else {
      number[i] = pack1<kType>(x);
    }
  }
};

// Units of a row: kWidth pairs each in its rotated part, kWidth numbers each in the rest.
FAP_DEVICE uint32_t row_units(int width, int64_t rotary_dim, int64_t head_dim) {
  return static_cast<uint32_t>((head_dim - rotary_dim / 2) / width);
}

// Copies a unit of kWidth numbers.
template <DType kType, int kWidth>
FAP_DEVICE void copy_unit(const Number<kType>* x, Number<kType>* out, uint32_t unit) {
  Numbers<kType, kWidth>(x + unit * kWidth).store(out + unit * kWidth);
}

// Rotates a unit, or copies one of the rest; `out` may be `x`. Without tables (null) the angle is
// 0.
template <DType kType, DType kTable, int kWidth, bool kInterleaved>
FAP_DEVICE void rotate_unit(const Number<kType>* x, Number<kType>* out, const Number<kTable>* cos,
                            const Number<kTable>* sin, uint32_t unit, int rotary_dim,
                            bool conjugate) {
  using Row = Numbers<kType, kWidth>;
  const int half = rotary_dim / 2;
  const int pair = static_cast<int>(unit) * kWidth;
  if (cos == nullptr || pair >= half) {
    // Of the rest, or one of both parts that a unit of pairs has.
    if (x == out) return;
    const int first = pair < half ? pair : pair + half;
    Row(x + first).store(out + first);
    if (pair < half) Row(x + half + pair).store(out + half + pair);
    return;
  }
  // The unit's two blocks of numbers; number i of pair p is in block `place / kWidth`.
  const int first = kInterleaved ? 2 * pair : pair;
  const int second = kInterleaved ? 2 * pair + kWidth : half + pair;
  const Row in[2] = {Row(x + first), Row(x + second)};
  const Numbers<kTable, kWidth> cosines(cos + pair), sines(sin + pair);
  Row rotated[2];
#pragma unroll
  for (int p = 0; p < kWidth; ++p) {
    const int a = kInterleaved ? 2 * p : p;
    const int b = kInterleaved ? 2 * p + 1 : kWidth + p;
    const float c = cosines.get(p), s = conjugate ? -sines.get(p) : sines.get(p);
    const float u = in[a / kWidth].get(a % kWidth), v = in[b / kWidth].get(b % kWidth);
    rotated[a / kWidth].set(a % kWidth, u * c - v * s);
    rotated[b / kWidth].set(b % kWidth, u * s + v * c);
  }
  rotated[0].store(out + first);
  rotated[1].store(out + second);
}

}  // namespace flash_attn_plus::cuda
