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
  int stages = 1;  // buffers for tiles of keys and of values
  bool q_in_registers = false;
  int min_blocks = 1;  // blocks of threads that a multiprocessor must be able to hold
  Access access = Access::kWhole;
  bool paged = false;
  Masking masking = Masking::kNone;
  bool softcap = false;
  bool alibi = false;    // also serves calls without
  bool dropout = false;  // also serves calls without

  FAP_SHARED constexpr int threads() const { return num_warps * 32; }
  FAP_SHARED constexpr int shared_bytes() const {
    return (tile_m + 2 * stages * tile_n) * padded_row_bytes(head_dim);
  }
  // Several features: scores are brought to their final value, in units of log2, before the
  // softmax, which serves scales that are 0 or negative too. Otherwise a positive factor is left
  // for its exponent.
  FAP_SHARED constexpr bool transformed() const { return alibi && (softcap || dropout); }
  // Plain kernels keep all in registers; a feature costs a few words, and everything at once more.
  constexpr int max_spill_bytes() const {
    const int features = softcap + alibi + dropout;
    return access != Access::kWhole || paged || features > 1 ? 192 : features * 96;
  }
  constexpr int max_stack_bytes() const { return max_spill_bytes(); }

  constexpr bool operator==(const ForwardSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
    field("head_dim", head_dim);
    field("tile_m", tile_m);
    field("tile_n", tile_n);
    field("num_warps", num_warps);
    field("stages", stages);
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

// What a block of threads computes: rows row_block * tile_m on of one query head.
struct ForwardBlock {
  uint32_t batch, head, row_block;
};

struct ForwardArgs {
  ForwardParams params;
  // Blocks of threads are numbered so that those running together share keys in the L2 cache:
  // groups of (batch, head) pairs, in a group the blocks of rows from the last to the first (the
  // heaviest under a causal mask first), in those the pairs.
  uint32_t num_row_blocks = 0;  // of the longest sequence
  uint32_t num_pairs = 0;       // batch * num_heads
  FastDivisor pairs_per_group;
  FastDivisor last_group_pairs;  // of the last group, when it has fewer
  FastDivisor group_blocks;      // num_row_blocks * pairs_per_group
  FastDivisor num_heads;
  FastDivisor heads_per_key_head;
  uint32_t num_attention_blocks = 0;  // num_row_blocks * num_pairs; those after them fill the rows
                                      // of no sequence

  FAP_SHARED ForwardBlock block_at(uint32_t index) const {
    const uint32_t group = group_blocks.quotient(index);
    const uint32_t rest = index - group * group_blocks.divisor;
    const uint32_t first_pair = group * pairs_per_group.divisor;
    const FastDivisor& pairs =
        first_pair + pairs_per_group.divisor <= num_pairs ? pairs_per_group : last_group_pairs;
    const uint32_t row_block = pairs.quotient(rest);
    const uint32_t pair = first_pair + rest - row_block * pairs.divisor;
    const uint32_t batch = num_heads.quotient(pair);
    return {batch, pair - batch * num_heads.divisor, num_row_blocks - 1 - row_block};
  }
};

}  // namespace flash_attn_plus::cuda
