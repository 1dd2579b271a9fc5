#include "cuda/plan/forward.h"

#include <algorithm>
#include <span>

#include "attention/error.h"
#include "cuda/plan/kind.h"
#include "cuda/plan/tuning.h"

namespace flash_attn_plus::cuda {
namespace {

// What of a call decides its kernel.
struct Kind {
  DType dtype;
  int head_dim;  // of the tile
  Access access;
  bool paged;
  Masking masking;
  bool softcap;
  bool alibi;
  bool dropout;
  bool few_keys;  // for a block of threads, on average
};

Kind kind_of(const ForwardParams& params) {
  Kind kind;
  kind.dtype = params.dtype;
  kind.head_dim = tile_head_dim(params.head_dim);
  kind.access = common_access(params.head_dim, {&params.q, &params.k, &params.v, &params.out});
  kind.paged = params.block_table != nullptr;
  kind.masking = masking_of(params);
  // Where the largest product is not the largest score, the kernel for everything serves.
  const bool everything = !(params.softmax_scale > 0);
  kind.softcap = params.softcap > 0;
  kind.alibi = params.alibi_slopes != nullptr || everything;
  kind.dropout = params.dropout_p > 0 || everything;
  kind.few_keys = params.window_right >= 0 && params.seqlen_k < 1024;
  return kind;
}

// Common kinds have a kernel each. For the rest a kernel that can do more does: a window without
// bounds masks nothing, slopes of 0 add nothing, dropout with p = 0 drops nothing.
Kind widened(Kind kind) {
  // The mask is looked at in the first and last steps alone, so that one without bounds costs
  // nothing.
  if (kind.masking == Masking::kNone) kind.masking = Masking::kCausal;
  if (kind.paged && kind.access == Access::kPadded) kind.access = Access::kElement;
  const int features = kind.softcap + kind.alibi + kind.dropout;
  const bool common = kind.access == Access::kWhole && !kind.paged && features <= 1;
  if (common) return kind;
  const bool plain = features == 0 && kind.access != Access::kElement;
  if (!plain || kind.paged) kind.masking = Masking::kWindow;
  if (!plain) kind.alibi = kind.dropout = true;
  return kind;
}

struct TileShape {
  int tile_m, tile_n, num_warps, stages, min_blocks;
  bool q_in_registers = false;
};

// FLASH_ATTN_PLUS_FORWARD_TILES="tile_m,tile_n,num_warps,stages,min_blocks,q_in_registers"
// takes the place of the tables.
bool overridden(TileShape* shape) {
  static const TuningVariable variable("FLASH_ATTN_PLUS_FORWARD_TILES");
  int given[6];
  if (!variable.read(given)) return false;
  *shape = {given[0], given[1], given[2], given[3], given[4], given[5] != 0};
  return true;
}

ForwardSpec with_shape(const Kind& kind, const TileShape& shape) {
  ForwardSpec spec;
  spec.dtype = kind.dtype;
  spec.head_dim = kind.head_dim;
  spec.tile_m = shape.tile_m;
  spec.tile_n = shape.tile_n;
  spec.num_warps = shape.num_warps;
  spec.stages = shape.stages;
  spec.min_blocks = shape.min_blocks;
  spec.q_in_registers = shape.q_in_registers;
  spec.access = kind.access;
  spec.paged = kind.paged;
  spec.masking = kind.masking;
  spec.softcap = kind.softcap;
  spec.alibi = kind.alibi;
  spec.dropout = kind.dropout;
  return spec;
}

// The best shape first, as measured on an H200. A warp of 32 rows keeps head_dim + tile_n
// accumulators a thread, one of 16 rows half as many, out of 255 registers; Q fits into registers
// beside them for small heads, and for 16 rows. What the features of a kind need more comes off
// tile_n, or off the second buffer.
//
// Large heads are bound by what the L2 cache delivers, so a block takes 128 rows; with few keys its
// start counts for more, which two blocks of 64 rows hide.
std::span<const TileShape> shapes_for(const Kind& kind, const DeviceProperties& device) {
  static constexpr TileShape kSmall[] = {{128, 64, 4, 1, 2, true}, {64, 32, 4, 1, 1}};
  static constexpr TileShape kSmallCrowded[] = {{128, 64, 4, 1, 2}, {64, 32, 4, 1, 1}};
  static constexpr TileShape kMedium[] = {{128, 64, 4, 2, 2},
                                          {128, 64, 4, 1, 2},
                                          {128, 32, 4, 2, 2},
                                          {128, 32, 4, 1, 2},
                                          {64, 32, 4, 1, 1}};
  static constexpr TileShape kLarge[] = {
      {128, 64, 8, 2, 1, true}, {64, 64, 4, 1, 2, true}, {64, 32, 4, 1, 1}};
  static constexpr TileShape kLargest[] = {
      {128, 32, 8, 2, 1, true}, {64, 64, 4, 1, 2}, {64, 32, 4, 1, 1}};
  static constexpr TileShape kLargeCrowded[] = {
      {64, 32, 4, 2, 2}, {64, 32, 4, 1, 2}, {64, 32, 4, 1, 1}};
  const int features = kind.softcap + kind.alibi + kind.dropout;
  const bool common = features <= 1 && kind.access == Access::kWhole && !kind.paged;
  const bool window = kind.masking == Masking::kWindow;
  // ptxas takes a few more registers for 10.x and 11.x.
  const bool tight = device.arch >= 100 && device.arch < 120;
  if (kind.head_dim <= 64) {
    return features == 0 || (common && !kind.dropout) ? std::span(kSmall)
                                                      : std::span(kSmallCrowded);
  }
  if (kind.head_dim <= 128) {
    int first = kind.softcap || kind.alibi || window ? 1 : 0;
    if (!common || (kind.softcap && window) || (tight && first == 0)) first = 2;
    return std::span<const TileShape>(kMedium).subspan(first);
  }
  if (!common || features > 0) return kLargeCrowded;
  if (kind.head_dim == 256) {
    return std::span<const TileShape>(kLargest).subspan(kind.few_keys && !window ? 1 : 0);
  }
  // At 224 it would not fit the registers either.
  const bool narrow = kind.head_dim == 224 || tight || kind.few_keys;
  return std::span<const TileShape>(kLarge).subspan(narrow ? 1 : 0);
}

ForwardSpec choose(const Kind& call, const DeviceProperties& device) {
  const Kind kind = widened(call);
  if (TileShape shape; overridden(&shape)) return with_shape(kind, shape);
  constexpr int kReserved = 1024;  // of every resident block
  for (const TileShape& shape : shapes_for(kind, device)) {
    const ForwardSpec spec = with_shape(kind, shape);
    if (spec.shared_bytes() <= device.max_shared_per_block &&
        spec.min_blocks * (spec.shared_bytes() + kReserved) <= device.shared_per_multiprocessor) {
      return spec;
    }
  }
  fail("no tile of the forward kernel fits the shared memory of ", device.name);
}

uint32_t ceil_div(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

}  // namespace

ForwardPlan plan_forward(const ForwardParams& params, const DeviceProperties& device) {
  // The inner loop counts rows and columns in 32 bits.
  constexpr int64_t kMaxSeqlen = int64_t{1} << 30;
  if (params.seqlen_q >= kMaxSeqlen || params.seqlen_k >= kMaxSeqlen) {
    fail("sequences on CUDA must be shorter than 2^30, but q has ", params.seqlen_q,
         " rows and k has ", params.seqlen_k);
  }
  ForwardPlan plan;
  plan.spec = choose(kind_of(params), device);
  ForwardArgs& args = plan.args;
  args.params = params;
  args.num_row_blocks = ceil_div(params.seqlen_q, plan.spec.tile_m);
  const int64_t num_pairs = params.batch * params.num_heads;
  const int64_t blocks = args.num_row_blocks * num_pairs;
  // Rows of no sequence are few, or there is no hurry.
  const int64_t filling = params.cu_seqlens_q != nullptr
                              ? std::min<int64_t>(params.total_q, device.num_multiprocessors)
                              : 0;
  if (std::max(blocks, num_pairs) + filling > INT32_MAX) {
    fail("the call is too large for one launch: batch_size * num_heads is ", num_pairs, " and has ",
         blocks, " blocks of ", plan.spec.tile_m, " query rows");
  }
  args.num_pairs = static_cast<uint32_t>(num_pairs);
  // Pairs whose keys and values fill an eighth of the L2 cache, since blocks of several groups run
  // at the same time; query heads of a group share theirs.
  const int64_t key_bytes = 4 * params.seqlen_k * params.head_dim;
  const int64_t cached =
      device.l2_bytes / 8 / std::max<int64_t>(key_bytes, 1) * params.group_size();
  const uint32_t pairs_per_group =
      static_cast<uint32_t>(std::clamp<int64_t>(cached, 1, std::max<int64_t>(num_pairs, 1)));
  args.num_attention_blocks = static_cast<uint32_t>(blocks);
  args.pairs_per_group = FastDivisor(pairs_per_group);
  args.last_group_pairs = FastDivisor(args.num_pairs % pairs_per_group);
  args.group_blocks = FastDivisor(args.num_row_blocks * pairs_per_group);
  args.num_heads = FastDivisor(static_cast<uint32_t>(params.num_heads));
  args.heads_per_key_head = FastDivisor(static_cast<uint32_t>(params.group_size()));
  plan.shape = {blocks + filling, plan.spec.threads(), plan.spec.shared_bytes()};
  return plan;
}

std::vector<ForwardSpec> all_forward_specs(const DeviceProperties& device) {
  std::vector<ForwardSpec> specs;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int head_dim : kTileHeadDims) {
      for (const Access access : {Access::kWhole, Access::kPadded, Access::kElement}) {
        for (const Masking masking : {Masking::kNone, Masking::kCausal, Masking::kWindow}) {
          for (int flags = 0; flags < 32; ++flags) {
            const Kind kind{dtype,
                            head_dim,
                            access,
                            (flags & 1) != 0,
                            masking,
                            (flags & 2) != 0,
                            (flags & 4) != 0,
                            (flags & 8) != 0,
                            (flags & 16) != 0};
            const ForwardSpec spec = choose(kind, device);
            if (std::find(specs.begin(), specs.end(), spec) == specs.end()) specs.push_back(spec);
          }
        }
      }
    }
  }
  return specs;
}

}  // namespace flash_attn_plus::cuda
