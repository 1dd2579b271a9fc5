#include "cuda/plan/backward.h"

#include <algorithm>
#include <cstdint>

#include "attention/dropout.h"
#include "attention/error.h"
#include "cuda/plan/kind.h"

namespace flash_attn_plus::cuda {
namespace {

// What of a call decides its kernels.
struct Kind {
  DType dtype;
  int head_dim;  // of the tiles
  Access access;
  bool softcap, alibi, dropout, deterministic;
};

Kind kind_of(const BackwardParams& params) {
  Kind kind;
  kind.dtype = params.dtype;
  kind.head_dim = tile_head_dim(params.head_dim);
  kind.access = common_access(params.head_dim, {&params.q, &params.k, &params.v, &params.out,
                                                &params.dout, &params.dq, &params.dk, &params.dv});
  kind.softcap = params.softcap > 0;
  kind.alibi = params.alibi_slopes != nullptr;
  kind.dropout = params.dropout_p >= kMinDropoutP;
  kind.deterministic = params.deterministic;
  return kind;
}

// Common kinds have a kernel each. For the rest a kernel that can do more does: slopes of 0 add
// nothing, dropout with p = 0 drops nothing, a fixed order is an order.
Kind widened(Kind kind) {
  const int features = kind.softcap + kind.alibi + kind.dropout;
  const bool common = features + kind.deterministic <= 1;
  if (kind.access == Access::kWhole && common) return kind;
  if (kind.access == Access::kPadded && features == 0 && common) return kind;
  if (kind.access == Access::kWhole) kind.access = Access::kPadded;
  if (kind.access == Access::kElement) kind.deterministic = true;
  kind.alibi = kind.dropout = true;
  return kind;
}

// How many warps lie side by side over the rows of a product of rows x columns, the others over its
// columns: what lets a warp read the least from shared memory, with no part of 16 x 16 cut. 0 when
// nothing fits.
int warps_over_rows(int rows, int columns, int num_warps) {
  int best = 0, least = 0;
  for (int over_rows = 1; over_rows <= num_warps; over_rows *= 2) {
    const int over_columns = num_warps / over_rows;
    if (rows % (16 * over_rows) != 0 || columns % (16 * over_columns) != 0) continue;
    const int read = rows / over_rows + columns / over_columns;
    if (best == 0 || read <= least) {  // of equals the one with fewer rows
      best = over_rows;
      least = read;
    }
  }
  return best;
}

BackwardSpec with_tiles(const Kind& kind, const BackwardTiles& tiles,
                        const DeviceProperties& device) {
  BackwardSpec spec;
  spec.dtype = kind.dtype;
  spec.head_dim = kind.head_dim;
  spec.tile_m = tiles.tile_m;
  spec.tile_n = tiles.tile_n;
  spec.num_warps = tiles.num_warps;
  spec.score_warps_m = warps_over_rows(tiles.tile_m, tiles.tile_n, tiles.num_warps);
  spec.key_warps_n = warps_over_rows(tiles.tile_n, kind.head_dim, tiles.num_warps);
  spec.query_warps_m = warps_over_rows(tiles.tile_m, kind.head_dim, tiles.num_warps);
  spec.q_stages = tiles.q_stages;
  spec.do_stages = tiles.do_stages;
  spec.min_blocks = tiles.min_blocks;
  spec.access = kind.access;
  spec.softcap = kind.softcap;
  spec.alibi = kind.alibi;
  spec.dropout = kind.dropout;
  spec.deterministic = kind.deterministic;
  spec.vector_add = device.arch >= 90;
  return spec;
}

// Whether the tiles can be shared out among the warps, and how many blocks a multiprocessor needs
// room for.
bool fits(const BackwardSpec& spec, const DeviceProperties& device) {
  constexpr int kReserved = 1024;  // bytes of shared memory that the system takes of each block
  return spec.score_warps_m > 0 && spec.key_warps_n > 0 && spec.query_warps_m > 0 &&
         spec.shared_bytes() <= device.max_shared_per_block &&
         spec.min_blocks * (spec.shared_bytes() + kReserved) <= device.shared_per_multiprocessor;
}

// The best first, as measured on an H200. A thread keeps 2 tile_n head_dim / threads numbers of dK
// and dV, and twice tile_m tile_n / threads of the scores, in its registers, of which three blocks
// of 128 threads leave it 168.
struct Candidate {
  int max_head_dim;
  bool lean;  // not for the kernels that do everything
  BackwardTiles tiles;
};
constexpr Candidate kCandidates[] = {
    {48, true, {64, 64, 4, 2, 2, 3}},     //
    {64, true, {64, 64, 4, 2, 1, 3}},     //
    {64, false, {64, 128, 8, 2, 2, 1}},   //
    {80, false, {64, 64, 4, 2, 2, 2}},    //
    {128, false, {64, 128, 8, 2, 2, 1}},  //
    {128, false, {64, 128, 8, 2, 1, 1}},  //
    {128, false, {64, 64, 4, 2, 1, 1}},   //
    {128, false, {64, 64, 4, 1, 1, 1}},   //
    {256, false, {64, 64, 8, 2, 1, 1}},   //
    {256, false, {64, 64, 8, 1, 1, 1}},   //
    {256, false, {32, 32, 4, 2, 1, 1}},   //
};

BackwardSpec choose(const Kind& call, const DeviceProperties& device) {
  const Kind kind = widened(call);
  for (const Candidate& candidate : kCandidates) {
    if (kind.head_dim > candidate.max_head_dim) continue;
    if (candidate.lean && kind.alibi && kind.dropout) continue;
    const BackwardSpec spec = with_tiles(kind, candidate.tiles, device);
    if (fits(spec, device)) return spec;
  }
  fail("no tile of the backward kernel fits the shared memory of ", device.name);
}

BackwardPrepareSpec prepare_spec(const BackwardSpec& main) {
  // Padded access is whole access with one comparison more, which memory hides.
  return {main.dtype, main.head_dim, main.access};
}
BackwardConvertSpec convert_spec(const BackwardSpec& main) {
  return {main.dtype, main.head_dim, main.tile_m, main.access, main.vector_add};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

uint32_t checked_blocks(int64_t blocks) {
  if (blocks > INT32_MAX) fail("the call is too large for one launch: ", blocks, " blocks");
  return static_cast<uint32_t>(blocks);
}

}  // namespace

void BackwardPlan::set_workspace(void* workspace) {
  char* memory = static_cast<char*>(workspace);
  args.accumulator = reinterpret_cast<float*>(memory);
  args.ticket = reinterpret_cast<uint32_t*>(memory + counters_offset);
  args.counters = args.ticket + 1;
}

BackwardPlan plan_backward(const BackwardParams& params, const DeviceProperties& device,
                           const BackwardTiles* tiles) {
  BackwardPlan plan;
  if (tiles != nullptr) {
    plan.main = with_tiles(widened(kind_of(params)), *tiles, device);
    if (!fits(plan.main, device)) fail("these tiles do not fit ", device.name);
  } else {
    plan.main = choose(kind_of(params), device);
  }
  const BackwardSpec& main = plan.main;
  plan.prepare = prepare_spec(main);
  plan.convert = convert_spec(main);

  BackwardArgs& args = plan.args;
  args.params = params;
  args.tile_m = main.tile_m;
  const bool packed = params.cu_seqlens_q != nullptr;

  // The workspace: accumulator blocks, then ticket and counters.
  args.blocks_per_head =
      packed ? params.total_q / main.tile_m + params.batch : ceil_div(params.seqlen_q, main.tile_m);
  const int64_t accumulator_blocks =
      args.blocks_per_head * params.num_heads * (packed ? 1 : params.batch);
  plan.counters_offset =
      static_cast<size_t>(accumulator_blocks) * main.tile_m * main.head_dim * sizeof(float);
  const size_t counters = main.deterministic ? 1 + static_cast<size_t>(accumulator_blocks) : 0;
  plan.workspace_bytes = round_up(plan.counters_offset + counters * sizeof(uint32_t), 16);
  args.workspace_chunks = static_cast<int64_t>(plan.workspace_bytes / 16);

  const int64_t rows = packed ? params.total_q : params.seqlen_q;
  const int64_t row_blocks = ceil_div(rows, BackwardPrepareSpec::kRows);
  const int64_t row_pairs = params.num_heads * (packed ? 1 : params.batch);
  const int64_t key_row_blocks =
      params.cu_seqlens_k != nullptr ? ceil_div(params.total_k, BackwardPrepareSpec::kRows) : 0;
  args.num_row_blocks = checked_blocks(row_blocks);
  args.num_prepare_blocks = checked_blocks(row_blocks * row_pairs);
  // One block at the least: the workspace is to be zeroed even where there are no rows.
  const int64_t prepare_blocks = std::max<int64_t>(row_blocks * row_pairs + key_row_blocks, 1);
  plan.prepare_shape = {checked_blocks(prepare_blocks), plan.prepare.threads(),
                        plan.prepare.shared_bytes()};

  args.num_key_blocks = checked_blocks(ceil_div(params.seqlen_k, main.tile_n));
  args.num_pairs = checked_blocks(params.batch * params.num_heads_k);
  args.group_size = static_cast<uint32_t>(params.group_size());
  // Pairs whose Q, dO and float32 dQ fill half of the L2 cache.
  const int64_t pair_bytes = 8 * params.seqlen_q * params.head_dim * params.group_size();
  args.pairs_per_group = static_cast<uint32_t>(std::clamp<int64_t>(
      device.l2_bytes / 2 / std::max<int64_t>(pair_bytes, 1), 1, std::max(args.num_pairs, 1u)));
  plan.main_shape = {checked_blocks(int64_t{args.num_key_blocks} * args.num_pairs), main.threads(),
                     main.shared_bytes()};

  args.num_query_blocks = checked_blocks(ceil_div(params.seqlen_q, main.tile_m));
  plan.convert_shape = {
      checked_blocks(int64_t{args.num_query_blocks} * params.batch * params.num_heads),
      plan.convert.threads(), plan.convert.shared_bytes()};

  plan.sink_shape = {params.ds_aux != nullptr ? params.num_heads : 0, plan.sink.threads(),
                     plan.sink.shared_bytes()};
  return plan;
}

BackwardSpecs all_backward_specs(const DeviceProperties& device) {
  BackwardSpecs specs;
  const auto add = [](auto& list, const auto& spec) {
    if (std::find(list.begin(), list.end(), spec) == list.end()) list.push_back(spec);
  };
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int head_dim : kTileHeadDims) {
      for (const Access access : {Access::kWhole, Access::kPadded, Access::kElement}) {
        for (int flags = 0; flags < 16; ++flags) {
          const Kind kind{dtype,
                          head_dim,
                          access,
                          (flags & 1) != 0,
                          (flags & 2) != 0,
                          (flags & 4) != 0,
                          (flags & 8) != 0};
          const BackwardSpec main = choose(kind, device);
          add(specs.main, main);
          add(specs.prepare, prepare_spec(main));
          add(specs.convert, convert_spec(main));
        }
      }
    }
  }
  specs.sink.push_back({});
  return specs;
}

}  // namespace flash_attn_plus::cuda
