// The keys of a sequence as cuda/kernels/key_tiles.cuh and key_steps.cuh bring them in.
//
// bool kPaged; Access kAccess; int kRows, kCols: of a tile; int kThreads: that copy one together;
// int kGroups: groups of threads that share the steps.
#include "cuda/kernels/key_steps.cuh"
#include "cuda/kernels/key_tiles.cuh"

namespace flash_attn_plus::cuda {

using TestTile = Tile<kRows, kCols>;

// Of one operand: the values lie where the keys do, further on by `v_offset` numbers.
struct Strides {
  int64_t batch, row, head, table;
};
FAP_DEVICE ForwardParams params_of(const uint16_t* k, int64_t v_offset, const int32_t* table,
                                   const int32_t* leftpad, const Strides& strides,
                                   int64_t page_size, int64_t num_pages, int64_t seqlen_k) {
  ForwardParams params;
  params.seqlen_q = 1;
  params.seqlen_k = seqlen_k;
  params.k.data = const_cast<uint16_t*>(k);
  params.k.batch_stride = strides.batch;
  params.k.row_stride = strides.row;
  params.k.head_stride = strides.head;
  params.v = params.k;
  params.v.data = const_cast<uint16_t*>(k + v_offset);
  params.leftpad_k = leftpad;
  params.block_table = table;
  params.block_table_stride = strides.table;
  params.page_size = page_size;
  params.num_pages = num_pages;
  return params;
}

FAP_DEVICE void store_tile(TestTile tile, const unsigned char* memory, uint16_t* out, int thread) {
  for (int i = thread; i < kRows * kCols; i += kThreads) {
    const uint32_t place = tile.at(i / kCols, i % kCols) - tile.base;
    out[i] = *reinterpret_cast<const uint16_t*>(memory + place);
  }
}

// Writes the keys of a sequence and head to `out`, whole tiles.
extern "C" __global__ void tiles(const uint16_t* k, const int32_t* table, const int32_t* leftpad,
                                 uint16_t* out, int64_t batch_stride, int64_t row_stride,
                                 int64_t head_stride, int64_t table_stride, int64_t page_size,
                                 int64_t num_pages, int64_t seqlen_k, int64_t head_dim,
                                 int64_t batch, int64_t head) {
  __shared__ alignas(128) unsigned char memory[TestTile::kBytes];
  const TestTile tile{shared_address(memory)};
  const int thread = threadIdx.x;
  const ForwardParams params =
      params_of(k, 0, table, leftpad, {batch_stride, row_stride, head_stride, table_stride},
                page_size, num_pages, seqlen_k);
  const Sequence sequence = sequence_at(params, batch);
  const int length = static_cast<int>(sequence.seqlen_k);
  const int last = (length - 1) / kRows;
  KeyTiles<kPaged, kAccess, kThreads, TestTile> keys(params, params.k, sequence, batch, head,
                                                     thread, last * kRows);
  for (int i = last; i >= 0; --i) {
    keys.copy_next(tile, thread, static_cast<int>(head_dim), length - i * kRows);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    store_tile(tile, memory, out + i * kRows * kCols, thread);
    __syncthreads();
  }
}

// The same, keys and values, by steps that groups of threads share in turn.
extern "C" __global__ void steps(const uint16_t* k, int64_t v_offset, const int32_t* table,
                                 const int32_t* leftpad, uint16_t* out_k, uint16_t* out_v,
                                 int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                                 int64_t table_stride, int64_t page_size, int64_t num_pages,
                                 int64_t seqlen_k, int64_t head_dim, int64_t batch, int64_t head) {
  __shared__ uint32_t unread[kGroups * kThreads / 8];
  __shared__ alignas(128) unsigned char memory[kGroups][2][TestTile::kBytes];
  const int group = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
  const TestTile k_tile{shared_address(memory[group][0])}, v_tile{shared_address(memory[group][1])};
  const ForwardParams params =
      params_of(k, v_offset, table, leftpad, {batch_stride, row_stride, head_stride, table_stride},
                page_size, num_pages, seqlen_k);
  const Sequence sequence = sequence_at(params, batch);
  const int length = static_cast<int>(sequence.seqlen_k);
  KeySteps<kPaged, kAccess, kThreads, kGroups * kRows, TestTile> keys(
      params, sequence, batch, head, thread, group * kRows, length);
  const uint32_t own_unread = shared_address(unread) + threadIdx.x / 8 * 4;
  keys.look_up(own_unread);
  copy_async_commit();
  copy_async_wait<0>();
  for (int first = 0; first < length; first += kGroups * kRows) {
    const int own = first + group * kRows;
    keys.copy_next(k_tile, v_tile, thread, static_cast<int>(head_dim), length - own);
    keys.look_up(own_unread);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (own < length) {
      store_tile(k_tile, memory[group][0], out_k + own * kCols, thread);
      store_tile(v_tile, memory[group][1], out_v + own * kCols, thread);
    }
    __syncthreads();
  }
}

}  // namespace flash_attn_plus::cuda
