// Specialisations and arguments of the backward kernels: prepare, the main kernel, convert, and the
// gradient of the sinks.
#pragma once

#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

// Masks are not among its fields: whether a step needs one is seen from two numbers.
struct BackwardSpec {
  static constexpr const char* kKernel = "sm80/backward";
  static constexpr const char* kEntry = "attention_backward";

  DType dtype = DType::kBFloat16;
  int head_dim = 128;  // of the tiles; a multiple of 16
  int tile_m = 64;     // query rows of a step
  int tile_n = 64;     // keys of a block of threads
  int num_warps = 4;
  // How the warps share the three shapes of product: so many side by side over queries (keys), the
  // others over keys (the head dimension).
  int score_warps_m = 2;  // S and dP, tile_m x tile_n
  int key_warps_n = 2;    // dK and dV, tile_n x head_dim
  int query_warps_m = 2;  // dQ, tile_m x head_dim
  int q_stages = 2;       // buffers for tiles of Q
  int do_stages = 1;      // and of dO, at most as many
  int min_blocks = 1;     // blocks of threads that a multiprocessor must be able to hold
  Access access = Access::kWhole;
  bool softcap = false;
  bool alibi = false;
  bool dropout = false;
  bool deterministic = false;  // parts of dQ are added in a fixed order
  bool vector_add = false;     // four numbers in one addition to memory: compute capability 9.0

  FAP_SHARED constexpr int threads() const { return num_warps * 32; }
  // Log-sum-exp and D of a step's rows; what a block of threads works on.
  FAP_SHARED constexpr int row_buffer_bytes() const { return 2 * tile_m * 4; }
  FAP_SHARED constexpr int place_bytes() const { return 5 * 16; }
  FAP_SHARED constexpr int shared_bytes() const {
    return ((q_stages + do_stages) * tile_m + 2 * tile_n) * padded_row_bytes(head_dim) +
           2 * tile_m * padded_row_bytes(tile_n) + row_buffer_bytes() + place_bytes();
  }

  // A few words of a feature's leave the registers where three blocks share a multiprocessor, and
  // in the kernels that do everything. Plain kernels keep all of theirs.
  constexpr int max_spill_bytes() const {
    const bool crowded = min_blocks == 3 && (softcap || alibi || dropout);
    return crowded || (alibi && dropout) ? 32 : 0;
  }
  constexpr int max_stack_bytes() const { return max_spill_bytes(); }

  constexpr bool operator==(const BackwardSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("tile_m", tile_m);
    field("tile_n", tile_n);
    field("num_warps", num_warps);
    field("score_warps_m", score_warps_m);
    field("key_warps_n", key_warps_n);
    field("query_warps_m", query_warps_m);
    field("q_stages", q_stages);
    field("do_stages", do_stages);
    field("min_blocks", min_blocks);
    field("access", access);
    field("softcap", softcap);
    field("alibi", alibi);
    field("dropout", dropout);
    field("deterministic", deterministic);
    field("vector_add", vector_add);
  }
};

// Row sums of dO * O, and zeros where the other kernels add or do not come.
struct BackwardPrepareSpec {
  static constexpr const char* kKernel = "sm80/backward_prepare";
  static constexpr const char* kEntry = "attention_backward_prepare";
  static constexpr int kRows = 64;  // of a block of threads

  DType dtype = DType::kBFloat16;
  int head_dim = 128;
  Access access = Access::kWhole;

  FAP_SHARED constexpr int threads() const { return 256; }
  FAP_SHARED constexpr int shared_bytes() const { return 0; }

  constexpr bool operator==(const BackwardPrepareSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("access", access);
  }
};

// dq from its accumulator.
struct BackwardConvertSpec {
  static constexpr const char* kKernel = "sm80/backward_convert";
  static constexpr const char* kEntry = "attention_backward_convert";

  DType dtype = DType::kBFloat16;
  int head_dim = 128;
  int tile_m = 64;
  Access access = Access::kWhole;
  bool vector_add = false;

  FAP_SHARED constexpr int threads() const { return 256; }
  FAP_SHARED constexpr int shared_bytes() const { return tile_m * padded_row_bytes(head_dim); }

  constexpr bool operator==(const BackwardConvertSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("tile_m", tile_m);
    field("access", access);
    field("vector_add", vector_add);
  }
};

// The gradient of the attention sinks.
struct BackwardSinkSpec {
  static constexpr const char* kKernel = "sm80/backward_sink";
  static constexpr const char* kEntry = "attention_backward_sink";

  FAP_SHARED constexpr int threads() const { return 256; }
  FAP_SHARED constexpr int shared_bytes() const { return 0; }

  constexpr bool operator==(const BackwardSinkSpec&) const = default;
  template <typename F>
  constexpr void visit(F&&) const {}
};

// What all four kernels are given.
//
// The workspace holds the accumulator of dQ and, in deterministic mode, a counter for each of its
// blocks (how many parts have been added) and one more that hands out the blocks of threads'
// numbers. A block of the accumulator is tile_m rows of a head, float32, in the order of mma()'s
// fragments (see accumulator_index()). Of a dense call every sequence and head has its own blocks;
// with variable length those of a sequence begin at q_begin / tile_m + batch, which leaves each one
// enough.
struct BackwardArgs {
  BackwardParams params;

  float* accumulator = nullptr;
  uint32_t* counters = nullptr;
  uint32_t* ticket = nullptr;
  int64_t workspace_chunks = 0;  // of 16 bytes, all zeroed by prepare
  int64_t blocks_per_head = 0;   // of the accumulator: of a sequence, of all when variable length
  int tile_m = 0;

  // Main kernel: blocks of threads are numbered so that those running together share Q, dO and dQ
  // in the L2 cache: groups of (batch, key head) pairs, in a group the blocks of keys from the
  // first to the last (the heaviest under a causal mask first), in those the pairs.
  uint32_t num_key_blocks = 0;  // of the longest sequence
  uint32_t num_pairs = 0;
  uint32_t group_size = 1;  // query heads of a key head
  uint32_t pairs_per_group = 1;

  // Prepare: blocks of rows of every head, then those that look for keys of no sequence.
  uint32_t num_row_blocks = 0;  // of a sequence, of all rows when variable length
  uint32_t num_prepare_blocks = 0;

  // Convert.
  uint32_t num_query_blocks = 0;  // of the longest sequence

  // The block of the accumulator that holds the first rows of a sequence, of head 0; a head's
  // blocks lie blocks_per_head behind those of the one before.
  FAP_SHARED int64_t first_accumulator_block(int64_t batch, int64_t q_begin) const {
    if (params.cu_seqlens_q == nullptr) return batch * params.num_heads * blocks_per_head;
    return q_begin / tile_m + batch;
  }
};

// Where entry i of a lane's fragment lies in a block of the accumulator: fragments of 16 x 8
// numbers row by row, each either lane by lane (one vector a lane) or entry by entry (a lane's
// number beside its neighbour's), so that what a warp adds at a time is contiguous.
FAP_SHARED constexpr int accumulator_index(bool vector_add, int head_dim, int row16, int col8,
                                           int lane, int i) {
  const int fragment = (row16 * (head_dim / 8) + col8) * 128;
  return fragment + (vector_add ? lane * 4 + i : i * 32 + lane);
}

}  // namespace flash_attn_plus::cuda
