// Attention of few query rows over many keys, as in decoding with a cache.
//
// Bound by memory: every key and value is read once and serves all query rows that share it, the
// rows of a GQA group being packed into tiles of 16, 32 or 64. A block of threads has one tile of
// rows and one split of the keys. Inside it `streams` groups of warps (one warp for each 16 rows)
// walk through the keys apart, taking turns by steps of `step_keys`: each has a ring of `stages`
// steps of K and V in shared memory that it fills (cp.async) and waits for alone, so that nothing
// in the loop waits for another stream, and some 100 kB a multiprocessor are always on the way.
// Scores, softmax and output stay in registers, as in the forward kernel; at the end the streams'
// softmaxes are merged through shared memory, in the order of the streams. With splits the result
// is a part, written in float32 for the combine kernel.
//
// Shared memory: the tile of queries, the rings, with pages a number for each stage and eight
// threads; after the loop, in the same place, the outputs of all warps in float32 and their sums.
#pragma once

#include "attention/sequence.h"
#include "attention/split.h"
#include "cuda/kernels/key_steps.cuh"
#include "cuda/kernels/parts.cuh"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/tile.cuh"

namespace flash_attn_plus::cuda {

inline constexpr int kDepth = spec.head_dim / 16;  // products of 16 columns in a row
inline constexpr int kScoreCols = spec.step_keys / 8;
inline constexpr int kOutCols = spec.head_dim / 8;

using QueryTile = Tile<spec.tile_m, spec.head_dim>;
using KeyTile = Tile<spec.step_keys, spec.head_dim>;

// All warps of a stream have come here: what they copied is there for all, what they read is free.
FAP_DEVICE void sync_stream(int stream) {
  if constexpr (spec.row_warps() == 1) {
    __syncwarp();
  } else {
    sync_threads(stream + 1, spec.row_warps() * 32);
  }
}

// The thread's two rows, lane / 4 and the one 8 below: which keys they see, and what turns their
// products into scores.
struct RowState {
  ScoreTransform transform[2];
  int begin[2], end[2];  // visible keys
  float position[2];     // i + off

  FAP_DEVICE RowState(const ForwardParams& params, const Mask& mask, int64_t batch, int head_k,
                      int first_row, int num_rows, Range keys)
      : transform{transform_of(params, batch, head_k, first_row, num_rows),
                  transform_of(params, batch, head_k, first_row + 8, num_rows)} {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int row = min_of(first_row + 8 * slot, num_rows - 1);
      const PackedRow packed(row, static_cast<int>(params.group_size()), head_k);
      const Range visible = mask.visible_keys(packed.query);
      begin[slot] = static_cast<int>(max_of(visible.begin, keys.begin));
      end[slot] = static_cast<int>(min_of(visible.end, keys.end));
      position[slot] = static_cast<float>(packed.query + mask.offset());
    }
  }

  FAP_DEVICE static ScoreTransform transform_of(const ForwardParams& params, int64_t batch,
                                                int head_k, int row, int num_rows) {
    const PackedRow packed(min_of(row, num_rows - 1), static_cast<int>(params.group_size()),
                           head_k);
    return ScoreTransform(params, spec.transformed && params.softcap > 0.0f, batch, packed.head);
  }

  template <bool kSoftcap, bool kAlibi>
  FAP_DEVICE void apply(Fragments<1, kScoreCols>& s, int first_key) const {
    const int first = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kScoreCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float distance = position[i / 2] - static_cast<float>(first + 8 * n + i % 2);
        s[0][n][i] = transform[i / 2].operator()<kSoftcap, kAlibi>(s[0][n][i], distance);
      }
    }
  }

  FAP_DEVICE void mask(Fragments<1, kScoreCols>& s, int first_key) const {
    const int first = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kScoreCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + 8 * n + i % 2;
        if (key < begin[i / 2] || key >= end[i / 2]) s[0][n][i] = -kInfinity;
      }
    }
  }
};

// Whether any of the warp's part of a tile is infinite or NaN.
FAP_DEVICE bool has_nonfinite(KeyTile tile) {
  constexpr uint32_t kExponent = spec.dtype == DType::kBFloat16 ? 0x7F80u : 0x7C00u;
  bool found = false;
#pragma unroll 4
  for (int i = lane_id(); i < KeyTile::kRows * KeyTile::kChunks; i += 32) {
    const uint4 x = load_shared16(tile.at(i / KeyTile::kChunks, i % KeyTile::kChunks * 8));
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      found |=
          (words[word] & kExponent) == kExponent || (words[word] >> 16 & kExponent) == kExponent;
    }
  }
  return __any_sync(0xFFFFFFFFu, found);
}

// out += p v where p is 0 for keys that a row does not see and v may be NaN there, which a product
// of matrices would spread. Slow, and as good as never needed.
FAP_DEVICE void add_visible_values(Fragments<1, kOutCols>& out, const Fragments<1, kScoreCols>& p,
                                   KeyTile v_tile, const RowState& rows, int first_key) {
  const int lane = lane_id();
#pragma unroll 1
  for (int j = 0; j < spec.step_keys; ++j) {
    float weight[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kScoreCols; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * n + i % 2 == (j & ~7) + (j & 1)) weight[i / 2] = p[0][n][i];
      }
    }
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      weight[slot] = __shfl_sync(0xFFFFFFFFu, weight[slot], (lane & ~3) + (j & 7) / 2);
      const int key = first_key + j;
      if (key < rows.begin[slot] || key >= rows.end[slot]) continue;
#pragma unroll
      for (int n = 0; n < kOutCols; ++n) {
        float low, high;
        unpack2<spec.dtype>(load_shared4(v_tile.at(j, 8 * n + lane % 4 * 2)), low, high);
        out[0][n][2 * slot] = fmaf(weight[slot], low, out[0][n][2 * slot]);
        out[0][n][2 * slot + 1] = fmaf(weight[slot], high, out[0][n][2 * slot + 1]);
      }
    }
  }
}

FAP_DEVICE void add_values(Fragments<1, kOutCols>& out, const Fragments<1, kScoreCols>& p,
                           KeyTile v_tile) {
#pragma unroll
  for (int n = 0; n < kScoreCols; n += 2) {
    const uint32_t a[4] = {pack2<spec.dtype>(p[0][n][0], p[0][n][1]),
                           pack2<spec.dtype>(p[0][n][2], p[0][n][3]),
                           pack2<spec.dtype>(p[0][n + 1][0], p[0][n + 1][1]),
                           pack2<spec.dtype>(p[0][n + 1][2], p[0][n + 1][3])};
#pragma unroll
    for (int c = 0; c < kOutCols; c += 2) {
      uint32_t b[4];
      load_b_cols(b, v_tile, 8 * n, 8 * c);
      mma<spec.dtype>(out[0][c], a, b[0], b[1]);
      mma<spec.dtype>(out[0][c + 1], a, b[2], b[3]);
    }
  }
}

// Merges the streams' results and writes the rows of the tile.
FAP_DEVICE void write_rows(const DecodeArgs& args, const Sequence& sequence, int64_t batch,
                           int head_k, int split, int tile_row, int num_rows, uint32_t shared,
                           Fragments<1, kOutCols>& out, OnlineSoftmax<1>& softmax) {
  const ForwardParams& params = args.params;
  const int group_size = static_cast<int>(params.group_size());
  const int warp = warp_id(), lane = lane_id();
  const int stream = warp / spec.row_warps();
  const auto out_at = [&](int s, int row, int col) {
    return shared + static_cast<uint32_t>(((s * spec.tile_m + row) * spec.merge_row() + col) * 4);
  };
  const auto part_at = [&](int s, int row) {
    return shared +
           static_cast<uint32_t>(
               (spec.streams * spec.tile_m * spec.merge_row() + (s * spec.tile_m + row) * 2) * 4);
  };
  softmax.finish();
  __syncthreads();
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = warp % spec.row_warps() * 16 + lane / 4 + 8 * slot;
    if (lane % 4 == 0) {
      const bool any = softmax.sum[slot] != 0.0f;
      store_shared(part_at(stream, row),
                   make_float2(any ? softmax.reference[slot] : -kInfinity, softmax.sum[slot]));
    }
#pragma unroll
    for (int n = 0; n < kOutCols; ++n) {
      store_shared(out_at(stream, row, 8 * n + lane % 4 * 2),
                   make_float2(out[0][n][2 * slot], out[0][n][2 * slot + 1]));
    }
  }
  __syncthreads();

  constexpr int kQuads = spec.head_dim / 4;
  const int rows = min_of(spec.tile_m, num_rows - tile_row);
  for (int i = static_cast<int>(threadIdx.x); i < rows * kQuads; i += spec.threads()) {
    const int row = i / kQuads, col = i % kQuads * 4;
    PartialRow parts[spec.streams];
    PartialRow whole = {-kInfinity, 0.0f};
#pragma unroll
    for (int s = 0; s < spec.streams; ++s) {
      const float2 part = load_shared8(part_at(s, row));
      parts[s] = {part.x, part.y};
      whole.top = fmaxf(whole.top, parts[s].top);
    }
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < spec.streams; ++s) {
      const float weight = part_weight(parts[s], whole.top);
      const uint4 y = load_shared16(out_at(s, row, col));
      whole.sum = fmaf(parts[s].sum, weight, whole.sum);
      x.x = fmaf(__uint_as_float(y.x), weight, x.x);
      x.y = fmaf(__uint_as_float(y.y), weight, x.y);
      x.z = fmaf(__uint_as_float(y.z), weight, x.z);
      x.w = fmaf(__uint_as_float(y.w), weight, x.w);
    }
    if (args.num_splits > 1) {
      const int64_t rows_a_head = params.seqlen_q * group_size;
      const int64_t index = split * args.num_rows +
                            (batch * params.num_heads_k + head_k) * rows_a_head + tile_row + row;
      if (col == 0) args.partial_rows[index] = whole;
      *reinterpret_cast<float4*>(args.partial_out + index * spec.head_dim + col) = x;
    } else {
      const PackedRow packed(tile_row + row, group_size, head_k);
      const int64_t query = sequence.q_begin + packed.query;
      float factor;
      const float lse = finish_row(whole, sink_of(params, packed.head), &factor);
      if (col == 0) params.softmax_lse.set(batch, packed.head, query, lse);
      uint16_t* out_row = static_cast<uint16_t*>(params.out.data) +
                          batch * params.out.batch_stride + query * params.out.row_stride +
                          packed.head * params.out.head_stride;
      store_columns<spec.dtype, spec.access>(
          out_row, col, static_cast<int>(params.head_dim),
          make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor));
    }
  }
}

extern "C" __global__ void __launch_bounds__(spec.threads(), spec.min_blocks)
    attention_decode(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const ForwardParams& params = args.params;
  const int head_dim = static_cast<int>(params.head_dim);
  const int group_size = static_cast<int>(params.group_size());
  const uint32_t num_heads_k = static_cast<uint32_t>(params.num_heads_k);

  uint32_t block = blockIdx.x;
  const int head_k = static_cast<int>(block % num_heads_k);
  block /= num_heads_k;
  const int tile_row = static_cast<int>(block % args.num_row_tiles) * spec.tile_m;
  block /= args.num_row_tiles;
  const int64_t batch = block % static_cast<uint32_t>(params.batch);
  const int split = static_cast<int>(block / static_cast<uint32_t>(params.batch));

  if (args.num_splits == 1) fill_unused_rows(params);
  const Sequence sequence = sequence_at(params, batch);
  const int num_rows = static_cast<int>(sequence.seqlen_q) * group_size;
  if (tile_row >= num_rows) return;
  const Mask mask = sequence.mask(params);
  const Range queries = {tile_row / group_size,
                         (min_of(tile_row + spec.tile_m, num_rows) - 1) / group_size + 1};
  const Range keys =
      split_range(mask.any_visible_keys(queries), static_cast<int>(args.num_splits), split);
  const Range unmasked = mask.all_visible_keys(queries);
  const int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);

  const uint32_t shared = shared_address(shared_memory);
  const int warp = warp_id(), lane = lane_id();
  const int stream = warp / spec.row_warps();
  const int thread = static_cast<int>(threadIdx.x) % (spec.row_warps() * 32);  // in the stream
  const uint32_t ring = shared + spec.query_bytes() + stream * spec.stages * 2 * spec.tile_bytes();
  const auto k_tile = [&](int stage) { return KeyTile{ring + stage * 2 * spec.tile_bytes()}; };
  const auto v_tile = [&](int stage) {
    return KeyTile{ring + (stage * 2 + 1) * spec.tile_bytes()};
  };

  // Steps of this stream: `num_steps`, one every `kStride` keys from `first`.
  constexpr int kStride = spec.streams * spec.step_keys;
  const int first = begin + stream * spec.step_keys;
  const int num_steps = max_of(0, (end - first + kStride - 1) / kStride);
  KeySteps<spec.paged, spec.access, spec.row_warps() * 32, kStride, KeyTile> steps(
      params, sequence, batch, head_k, thread, first, end);
  const auto unread = [&](int stage) {
    return shared + spec.query_bytes() + spec.ring_bytes() +
           (stage * (spec.threads() / 8) + threadIdx.x / 8) * 4;
  };
  steps.look_up(unread(spec.stages - 1));
  // Step i, which comes after those copied so far. Always a group, if an empty one.
  const auto copy = [&](int i, int stage) {
    if (i < num_steps) {
      steps.copy_next(k_tile(stage), v_tile(stage), thread, head_dim, end - (first + i * kStride));
      steps.look_up(unread(stage));
    }
    copy_async_commit();
  };

  const QueryTile q_tile{shared};
  gather_rows<spec.access, spec.threads()>(
      q_tile, static_cast<int>(threadIdx.x), head_dim,
      [&](int row) {
        const PackedRow packed(min_of(tile_row + row, num_rows - 1), group_size, head_k);
        return static_cast<const uint16_t*>(params.q.data) + batch * params.q.batch_stride +
               (sequence.q_begin + packed.query) * params.q.row_stride +
               packed.head * params.q.head_stride;
      },
      num_rows - tile_row);
  copy_async_commit();
#pragma unroll
  for (int i = 0; i < spec.stages - 1; ++i) copy(i, i);

  const int warp_row = warp % spec.row_warps() * 16;
  const RowState rows(params, mask, batch, head_k, tile_row + warp_row + lane / 4, num_rows, keys);
  copy_async_wait<spec.stages - 1>();
  __syncthreads();
  uint32_t q[spec.q_in_registers() ? kDepth : 1][4];
  if constexpr (spec.q_in_registers()) {
#pragma unroll
    for (int c = 0; c < kDepth; ++c) load_a(q[c], q_tile, warp_row, 16 * c);
  }

  Fragments<1, kOutCols> out = {};
  OnlineSoftmax<1> softmax;
  int stage = 0;
#pragma unroll 1
  for (int i = 0; i < num_steps; ++i) {
    copy_async_wait<spec.stages - 2>();
    sync_stream(stream);
    copy(i + spec.stages - 1, stage == 0 ? spec.stages - 1 : stage - 1);
    const int key = first + i * kStride;

    Fragments<1, kScoreCols> s = {};
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      if constexpr (!spec.q_in_registers()) load_a(q[0], q_tile, warp_row, 16 * c);
      const auto& a = q[spec.q_in_registers() ? c : 0];
#pragma unroll
      for (int n = 0; n < kScoreCols; n += 2) {
        uint32_t b[4];
        load_b_rows(b, k_tile(stage), 8 * n, 16 * c);
        mma<spec.dtype>(s[0][n], a, b[0], b[1]);
        mma<spec.dtype>(s[0][n + 1], a, b[2], b[3]);
      }
    }
    if constexpr (!spec.transformed) {
      rows.apply<false, false>(s, key);
    } else if (params.softcap > 0.0f) {
      rows.apply<true, true>(s, key);
    } else {
      rows.apply<false, true>(s, key);
    }
    const bool masked =
        key < unmasked.begin || key + spec.step_keys > min_of(unmasked.end, keys.end);
    if (masked) rows.mask(s, key);
    softmax.update(s, out, 1.0f);
    if (masked && has_nonfinite(v_tile(stage))) {
      add_visible_values(out, s, v_tile(stage), rows, key);
    } else {
      add_values(out, s, v_tile(stage));
    }
    stage = stage == spec.stages - 1 ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  let_next_kernel_start();
  write_rows(args, sequence, batch, head_k, split, tile_row, num_rows, shared, out, softmax);
}

}  // namespace flash_attn_plus::cuda
