// Tiles of cuda/kernels/tile.cuh: where numbers lie, copies of rows, fragments.
//
// DType kType; Access kAccess; int kRows, kCols: of the tile; int kThreads: that copy.
#include "cuda/kernels/tile.cuh"

namespace flash_attn_plus::cuda {

using TestTile = Tile<kRows, kCols>;

// The address of every number in a tile at 0; of (8, 0) and (0, 16), as constant offsets say.
extern "C" __global__ void addresses(int32_t* out, int32_t* offsets, int32_t* bytes) {
  for (int i = threadIdx.x; i < kRows * kCols; i += blockDim.x) {
    out[i] = static_cast<int32_t>(TestTile{0}.at(i / kCols, i % kCols));
  }
  if (threadIdx.x > 0) return;
  offsets[0] = 8 * TestTile::kRowBytes;
  offsets[1] = 16 * 2;
  *bytes = TestTile::kBytes;
}

// The tile that comes of copying `num_valid` rows of x, those before `first_valid` left out;
// num_valid < 0: all rows there are. `order`: row r is row order[r] of x; null: one after another.
extern "C" __global__ void copied(const uint16_t* x, const int32_t* order, uint16_t* out,
                                  int64_t row_stride, int64_t head_dim, int64_t first_valid,
                                  int64_t num_valid) {
  __shared__ alignas(128) unsigned char memory[TestTile::kBytes];
  const TestTile tile{shared_address(memory)};
  const int thread = threadIdx.x, d = static_cast<int>(head_dim);
  const int valid = static_cast<int>(num_valid);
  for (int i = thread; i < TestTile::kBytes; i += kThreads) memory[i] = 0xFF;
  __syncthreads();
  if (order != nullptr) {
    gather_rows<kAccess, kThreads>(
        tile, thread, d, [&](int row) { return x + order[row] * row_stride; }, valid);
  } else if (first_valid > 0) {
    copy_thread_rows<kAccess, kThreads>(tile, thread, d,
                                        thread_source<TestTile, kThreads>(x, row_stride, thread),
                                        row_stride, valid, static_cast<int>(first_valid));
  } else if (num_valid < 0) {
    copy_rows<kAccess, kThreads>(tile, thread, d, x, row_stride, AllRows{});
  } else {
    copy_rows<kAccess, kThreads>(tile, thread, d, x, row_stride, valid);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int i = thread; i < kRows * kCols; i += kThreads) {
    const uint32_t place = tile.at(i / kCols, i % kCols) - tile.base;
    out[i] = *reinterpret_cast<const uint16_t*>(memory + place);
  }
}

// One warp. With the last 16 rows of a: scores (16, 32) = a b^T; and with the weights
// w (16, 32): out (16, kCols) = w b.
extern "C" __global__ void multiplied(const uint16_t* a, const uint16_t* b, const uint16_t* w,
                                      float* scores, float* out) {
  using ProductTile = Tile<32, kCols>;
  using WeightTile = Tile<16, 32>;
  __shared__ alignas(128) unsigned char memory[2 * ProductTile::kBytes + WeightTile::kBytes];
  const ProductTile a_tile{shared_address(memory)};
  const ProductTile b_tile{a_tile.base + ProductTile::kBytes};
  const WeightTile w_tile{b_tile.base + ProductTile::kBytes};
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  copy_rows<Access::kWhole, 32>(a_tile, lane, kCols, a, kCols, AllRows{});
  copy_rows<Access::kWhole, 32>(b_tile, lane, kCols, b, kCols, AllRows{});
  copy_rows<Access::kWhole, 32>(w_tile, lane, 32, w, 32, AllRows{});
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t left[4], right[4];
  for (int n = 0; n < 32; n += 16) {
    float sums[2][4] = {};
    for (int k = 0; k < kCols; k += 16) {
      load_a(left, a_tile, 16, k);
      load_b_rows(right, b_tile, n, k);
      mma<kType>(sums[0], left, right[0], right[1]);
      mma<kType>(sums[1], left, right[2], right[3]);
    }
    for (int i = 0; i < 8; ++i) {
      scores[(g + i % 4 / 2 * 8) * 32 + n + i / 4 * 8 + 2 * t + i % 2] = sums[i / 4][i % 4];
    }
  }
  for (int n = 0; n < kCols; n += 16) {
    float sums[2][4] = {};
    for (int k = 0; k < 32; k += 16) {
      load_a(left, w_tile, 0, k);
      load_b_cols(right, b_tile, k, n);
      mma<kType>(sums[0], left, right[0], right[1]);
      mma<kType>(sums[1], left, right[2], right[3]);
    }
    for (int i = 0; i < 8; ++i) {
      out[(g + i % 4 / 2 * 8) * kCols + n + i / 4 * 8 + 2 * t + i % 2] = sums[i / 4][i % 4];
    }
  }
}

}  // namespace flash_attn_plus::cuda
