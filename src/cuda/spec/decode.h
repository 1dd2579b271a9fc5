// The decode kernel's specialisation and argument, and those of the kernel that merges its parts.
#pragma once

#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

struct DecodeSpec {
  static constexpr const char* kKernel = "sm80/decode";
  static constexpr const char* kEntry = "attention_decode";

  DType dtype = DType::kBFloat16;
  int head_dim = 128;  // of the tiles; a multiple of 16
  int tile_m = 16;     // packed query rows of a block of threads: 16 for each warp of a stream
  int streams = 4;     // groups of tile_m / 16 warps, each with keys of its own
  int step_keys = 16;  // keys of a step of a stream: 16 or 32
  int stages = 3;      // steps of a stream that are in shared memory or on the way there
  int min_blocks = 2;  // blocks of threads that a multiprocessor must be able to hold
  Access access = Access::kWhole;
  bool paged = false;
  bool transformed = false;  // there may be a softcap, or slopes of ALiBi

  FAP_SHARED constexpr int row_warps() const { return tile_m / 16; }
  FAP_SHARED constexpr int threads() const { return streams * row_warps() * 32; }
  FAP_SHARED constexpr int tile_bytes() const { return step_keys * padded_row_bytes(head_dim); }
  FAP_SHARED constexpr int query_bytes() const { return tile_m * padded_row_bytes(head_dim); }
  // Beside the rows of a quarter warp lie other banks.
  FAP_SHARED constexpr int merge_row() const { return head_dim + 8; }  // in floats
  FAP_SHARED constexpr int merge_bytes() const { return streams * tile_m * (merge_row() + 2) * 4; }
  FAP_SHARED constexpr int ring_bytes() const { return streams * stages * 2 * tile_bytes(); }
  FAP_SHARED constexpr int table_bytes() const { return paged ? stages * (threads() / 8) * 4 : 0; }
  FAP_SHARED constexpr int shared_bytes() const {
    return max_of(query_bytes() + ring_bytes() + table_bytes(), merge_bytes());
  }
  // Registers hold the queries where the output leaves room for them.
  FAP_SHARED constexpr bool q_in_registers() const { return head_dim <= 128; }

  constexpr bool operator==(const DecodeSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("tile_m", tile_m);
    field("streams", streams);
    field("step_keys", step_keys);
    field("stages", stages);
    field("min_blocks", min_blocks);
    field("access", access);
    field("paged", paged);
    field("transformed", transformed);
  }
};

// The part of a row's softmax that one split has seen: its sum of exponentials is sum * 2^top. A
// part without keys has top -inf, sum 0 and output 0.
struct PartialRow {
  float top;
  float sum;
};

struct DecodeArgs {
  ForwardParams params;
  // Blocks of threads are numbered by split, batch, tile of rows and key head, the head fastest:
  // those running together read neighbouring memory.
  uint32_t num_row_tiles = 0;    // of the longest sequence
  uint32_t num_splits = 1;       // from 2 on, results are parts, for the combine kernel
  int64_t num_rows = 0;          // batch * num_heads_k * (packed rows of the longest sequence)
  float* partial_out = nullptr;  // (num_splits, num_rows, head_dim of the tile), unnormalised
  PartialRow* partial_rows = nullptr;  // (num_splits, num_rows)
};

// Merges the parts of every row; takes the same argument.
struct CombineSpec {
  static constexpr const char* kKernel = "sm80/combine";
  static constexpr const char* kEntry = "attention_combine";

  DType dtype = DType::kBFloat16;
  int head_dim = 128;  // of the tiles
  Access access = Access::kWhole;

  FAP_SHARED constexpr int threads() const { return 128; }
  FAP_SHARED constexpr int warps() const { return threads() / 32; }

  constexpr bool operator==(const CombineSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("access", access);
  }
};

}  // namespace flash_attn_plus::cuda
