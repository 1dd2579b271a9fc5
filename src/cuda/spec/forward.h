// The forward kernel's specialisation and argument.
#pragma once

#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

struct ForwardSpec {
  static constexpr const char* kKernel = "sm80/forward";
  static constexpr const char* kEntry = "attention_forward";

  DType dtype = DType::kBFloat16;
  int head_dim = 128;  // of the tiles; a multiple of 16
  int tile_m = 128;    // query rows of a block of threads
  int tile_n = 64;     // keys of a step
  int num_warps = 4;
  int stages = 1;      // buffers for tiles of keys and of values
  bool ahead = false;  // the next step's scores are multiplied before this step's softmax
  bool q_in_registers = false;
  int min_blocks = 1;  // blocks of threads that a multiprocessor must be able to hold
  Access access = Access::kWhole;
  bool paged = false;
  Masking masking = Masking::kNone;
  bool softcap = false;
  bool alibi = false;    // also serves scales that are 0 or negative, without slopes
  bool dropout = false;  // also serves calls without

  FAP_SHARED constexpr int threads() const { return num_warps * 32; }
  FAP_SHARED constexpr int shared_bytes() const {
    return (tile_m + 2 * stages * tile_n) * padded_row_bytes(head_dim);
  }
  // Scores are brought to their final value, in units of log2, before the softmax; otherwise the
  // scale is a factor in its exponent.
  FAP_SHARED constexpr bool transformed() const { return softcap || alibi; }

  constexpr bool operator==(const ForwardSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("tile_m", tile_m);
    field("tile_n", tile_n);
    field("num_warps", num_warps);
    field("stages", stages);
    field("ahead", ahead);
    field("q_in_registers", q_in_registers);
    field("min_blocks", min_blocks);
    field("access", access);
    field("paged", paged);
    field("masking", masking);
    field("softcap", softcap);
    field("alibi", alibi);
    field("dropout", dropout);
  }
};

struct ForwardArgs {
  ForwardParams params;
  // Blocks of threads are numbered so that those running together share keys in the L2 cache:
  // groups of (batch, head) pairs, in a group the blocks of queries from the last to the first (the
  // heaviest under a causal mask first), in those the pairs.
  uint32_t num_query_blocks = 0;  // of the longest sequence
  uint32_t num_pairs = 0;         // batch * num_heads
  uint32_t pairs_per_group = 1;
  uint32_t num_attention_blocks = 0;  // num_query_blocks * num_pairs; those after fill the rows of
                                      // no sequence
};

}  // namespace flash_attn_plus::cuda
