// Rotary embedding of rows by units, as cuda/kernels/rotary.cuh does it.
//
// DType kType, kTable: of the rows and of the tables; int kWidth: of a unit; bool kInterleaved.
#include "cuda/kernels/rotary.cuh"

namespace flash_attn_plus::cuda {

// A block of threads for each row of x and out (rows, head_dim) and of the tables
// (rows, rotary_dim / 2), which may be null.
extern "C" __global__ void rotated(const Number<kType>* x, Number<kType>* out,
                                   const Number<kTable>* cos, const Number<kTable>* sin,
                                   int64_t head_dim, int64_t rotary_dim, int64_t conjugate) {
  const int64_t row = blockIdx.x;
  if (cos != nullptr) {
    cos += row * (rotary_dim / 2);
    sin += row * (rotary_dim / 2);
  }
  const uint32_t units = row_units(kWidth, rotary_dim, head_dim);
  for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
    rotate_unit<kType, kTable, kWidth, kInterleaved>(x + row * head_dim, out + row * head_dim, cos,
                                                     sin, unit, static_cast<int>(rotary_dim),
                                                     conjugate != 0);
  }
}

extern "C" __global__ void copied(const Number<kType>* x, Number<kType>* out, int64_t head_dim) {
  const int64_t row = blockIdx.x * head_dim;
  const uint32_t units = row_units(kWidth, 0, head_dim);
  for (uint32_t unit = threadIdx.x; unit < units; unit += blockDim.x) {
    copy_unit<kType, kWidth>(x + row, out + row, unit);
  }
}

}  // namespace flash_attn_plus::cuda
