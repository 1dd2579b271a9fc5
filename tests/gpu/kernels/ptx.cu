// The names of cuda/kernels/ptx.cuh, each by itself.
//
// DType kType: of the 16-bit numbers.
#include "cuda/kernels/ptx.cuh"

namespace flash_attn_plus::cuda {

extern "C" __global__ void approximations(const float* x, float* exp2, float* log2,
                                          float* reciprocal, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  exp2[i] = exp2_approx(x[i]);
  log2[i] = log2_approx(x[i]);
  reciprocal[i] = reciprocal_approx(x[i]);
}

extern "C" __global__ void packed(const float* x, uint16_t* singles, uint32_t* pairs, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  singles[i] = pack1<kType>(x[i]);
  if (i % 2 == 0) pairs[i / 2] = pack2<kType>(x[i], x[i + 1]);
}

extern "C" __global__ void unpacked(const uint16_t* x, float* singles, float* pairs, int64_t n) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  singles[i] = unpack1<kType>(x[i]);
  if (i % 2 == 0) unpack2<kType>(x[i] | uint32_t{x[i + 1]} << 16, pairs[i], pairs[i + 1]);
}

// One warp; x is four 8x8 matrices. What every lane receives of each, of their transposes, and what
// comes of giving it back (compute capability 9.0).
extern "C" __global__ void matrices(const uint16_t* x, uint32_t* received, uint32_t* transposed,
                                    uint16_t* given_back) {
  __shared__ alignas(128) uint16_t memory[4 * 64];
  const int lane = lane_id();
  const uint32_t row = shared_address(memory + 8 * lane);
  for (int i = lane; i < 256; i += 32) memory[i] = x[i];
  __syncthreads();
  uint32_t registers[4];
  load_matrices_transposed(registers, row);
  for (int i = 0; i < 4; ++i) transposed[4 * lane + i] = registers[i];
  load_matrices(registers, row);
  for (int i = 0; i < 4; ++i) received[4 * lane + i] = registers[i];
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  for (int i = lane; i < 256; i += 32) memory[i] = 0;
  __syncthreads();
  store_matrices(row, registers);
  __syncthreads();
#endif
  for (int i = lane; i < 256; i += 32) given_back[i] = memory[i];
}

// One warp; each lane copies 16 bytes of x if it is one of the first, in a group of their own, then
// 16 bytes of y. Of the first group it reads what it has waited for.
extern "C" __global__ void copies(const uint16_t* x, const uint16_t* y, uint16_t* out_x,
                                  uint16_t* out_y, int64_t num_valid) {
  __shared__ alignas(128) uint16_t memory[2][32 * 8];
  const int first = 8 * lane_id();
  for (int i = first; i < first + 8; ++i) memory[0][i] = memory[1][i] = 0xFFFF;
  __syncthreads();
  copy_async16(shared_address(memory[0] + first), x + first, lane_id() < num_valid);
  copy_async_commit();
  copy_async16(shared_address(memory[1] + first), y + first, true);
  copy_async_commit();
  copy_async_wait<1>();
  for (int i = first; i < first + 8; ++i) out_x[i] = memory[0][i];
  copy_async_wait<0>();
  for (int i = first; i < first + 8; ++i) out_y[i] = memory[1][i];
}

// One warp; x is four words of each lane: through memory as 16, 4, 8 and twice 2 bytes.
extern "C" __global__ void shared_accesses(const uint32_t* x, uint32_t* out) {
  __shared__ alignas(128) uint32_t memory[32 * 4];
  const int lane = lane_id();
  const uint32_t address = shared_address(memory + 4 * lane);
  x += 4 * lane;
  out += 8 * lane;
  store_shared16(address, make_uint4(x[0], x[1], x[2], x[3]));
  const uint4 four = load_shared16(address);
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  store_shared(address + 4, x[0]);
  out[4] = load_shared4(address + 4);
  store_shared(address + 8, make_float2(__uint_as_float(x[1]), __uint_as_float(x[2])));
  const float2 two = load_shared8(address + 8);
  out[5] = __float_as_uint(two.x), out[6] = __float_as_uint(two.y);
  store_shared(address, static_cast<uint16_t>(x[3]));
  store_shared(address + 2, static_cast<uint16_t>(x[3] >> 16));
  out[7] = load_shared4(address);
}

// One warp: d = c + a b, a (16, 16), b (16, 8), c and d (16, 8), all row by row.
extern "C" __global__ void multiplied(const uint16_t* a, const uint16_t* b, const float* c,
                                      float* d) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto columns = [&](int row, int col) {
    return a[16 * row + col] | uint32_t{a[16 * row + col + 1]} << 16;
  };
  const auto rows = [&](int row, int col) {
    return b[8 * row + col] | uint32_t{b[8 * (row + 1) + col]} << 16;
  };
  const uint32_t a_part[4] = {columns(g, 2 * t), columns(g + 8, 2 * t), columns(g, 2 * t + 8),
                              columns(g + 8, 2 * t + 8)};
  const int places[4] = {8 * g + 2 * t, 8 * g + 2 * t + 1, 8 * (g + 8) + 2 * t,
                         8 * (g + 8) + 2 * t + 1};
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[places[i]];
  mma<kType>(sums, a_part, rows(2 * t, g), rows(2 * t + 8, g));
  for (int i = 0; i < 4; ++i) d[places[i]] = sums[i];
}

extern "C" __global__ void threads(const float* x, int32_t* lanes, int32_t* warps, float* largest,
                                   float* sums) {
  const int i = threadIdx.x;
  lanes[i] = lane_id();
  warps[i] = warp_id();
  largest[i] = quad_max(x[i]);
  sums[i] = quad_sum(x[i]);
}

// Two groups of 64 threads, each with a barrier of its own, turn their numbers round.
extern "C" __global__ void barriers(const float* x, float* out) {
  __shared__ float memory[128];
  const int group = threadIdx.x / 64, thread = threadIdx.x % 64;
  for (int round = 0; round < 1 + group; ++round) {  // not as often in both
    memory[64 * group + thread] = x[64 * group + thread];
    sync_threads(1 + group, 64);
    out[64 * group + thread] = memory[64 * group + 63 - thread];
    sync_threads(1 + group, 64);
  }
}

// Every thread adds its number to one of 16 sums, and four numbers to one of four rows.
extern "C" __global__ void added(const float* x, float* sums, float* rows) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  add_to_memory(sums + i % 16, x[i]);
#if __CUDA_ARCH__ >= 900
  add_to_memory4(rows + 4 * (i % 4), {x[i], 2 * x[i], 3 * x[i], 4 * x[i]});
#else
  for (int j = 0; j < 4; ++j) add_to_memory(rows + 4 * (i % 4) + j, (j + 1) * x[i]);
#endif
}

// Block 0 reads what the others have written once all have said that they have.
extern "C" __global__ void released(const float* x, float* written, uint32_t* count, float* out) {
  const int64_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (blockIdx.x > 0) {
    written[i] = x[i];
    __syncthreads();
    if (threadIdx.x == 0) add_release(count, blockIdx.x);
    return;
  }
  const uint32_t all = gridDim.x * (gridDim.x - 1) / 2;
  while (threadIdx.x == 0 && load_acquire(count) != all) {
  }
  __syncthreads();
  for (int block = 1; block < gridDim.x; ++block) {
    out[block * blockDim.x + threadIdx.x] = written[block * blockDim.x + threadIdx.x];
  }
}

}  // namespace flash_attn_plus::cuda
