#include "cuda/plan/decode.h"

#include <algorithm>
#include <limits>

#include "attention/split.h"
#include "cuda/plan/kind.h"
#include "cuda/plan/tuning.h"

namespace flash_attn_plus::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What of a call decides its kernel.
struct Kind {
  DType dtype;
  int head_dim;  // of the tile
  Access access;
  bool paged;
  bool transformed;
  int64_t rows;   // packed query rows of a key head
  bool one_wave;  // without splits there are no more blocks of threads than multiprocessors
};

int64_t packed_rows(const ForwardParams& params) { return params.seqlen_q * params.group_size(); }

Kind kind_of(const ForwardParams& params, const DeviceProperties& device) {
  Kind kind;
  kind.dtype = params.dtype;
  kind.head_dim = tile_head_dim(params.head_dim);
  kind.access = common_access(params.head_dim, {&params.q, &params.k, &params.v, &params.out});
  kind.paged = params.block_table != nullptr;
  kind.transformed = params.softcap > 0 || params.alibi_slopes != nullptr;
  kind.rows = packed_rows(params);
  // With a given number of splits nothing depends on the other sequences of the batch.
  kind.one_wave =
      params.num_splits == 0 && params.batch * params.num_heads_k <= device.num_multiprocessors;
  return kind;
}

// Streams of keys and their buffers, filling the shared memory; fewer streams where it is small.
// One wave of blocks takes one wide block a multiprocessor, which leaves the fewest parts to merge.
// Several waves take two, so that one reads while the other starts or ends.
DecodeSpec choose(const Kind& kind, const DeviceProperties& device) {
  constexpr int kMaxStages = 8, kReserved = 1024;  // bytes that a block takes beside its own
  DecodeSpec spec;
  spec.dtype = kind.dtype;
  spec.head_dim = kind.head_dim;
  spec.access = kind.access;
  spec.paged = kind.paged;
  // Kinds that are rare share a kernel that can do more, or does it in any number of waves.
  spec.transformed = kind.transformed || kind.access != Access::kWhole;
  spec.tile_m = kind.access == Access::kElement || kind.rows <= 16 ? 16 : kind.rows <= 32 ? 32 : 64;
  const bool one_wave = kind.one_wave && kind.access == Access::kWhole && spec.tile_m == 16;
  const struct {
    int min_blocks, step_keys, stages;
  } shapes[] = {
      {one_wave ? 1 : 2, one_wave || kind.head_dim < 64 ? 32 : 16, 3},
      {1, 16, one_wave ? 3 : 2},
      {1, 16, 2},
  };
  for (spec.streams = 64 / spec.tile_m; spec.streams >= 1; spec.streams /= 2) {
    for (const auto& shape : shapes) {
      spec.min_blocks = shape.min_blocks;
      spec.step_keys = shape.step_keys;
      const int shared = std::min(device.max_shared_per_block,
                                  device.shared_per_multiprocessor / spec.min_blocks - kReserved);
      spec.stages = 1;
      const int stage = spec.ring_bytes() + spec.table_bytes();
      spec.stages = std::clamp((shared - spec.query_bytes()) / stage, 0, kMaxStages);
      if (spec.stages >= shape.stages && spec.shared_bytes() <= shared) return spec;
    }
  }
  // Not reached on a GPU that is served: the smallest takes less than 64 kB.
  spec.streams = 1;
  spec.stages = 2;
  return spec;
}

// Keys that the queries of one sequence can see at most.
int64_t most_visible_keys(const ForwardParams& params) {
  if (params.window_left < 0 || params.window_right < 0) return params.seqlen_k;
  return std::min(params.seqlen_k, params.seqlen_q + params.window_left + params.window_right);
}

// Whether a call is decode's.
bool serves(const ForwardParams& params, const DeviceProperties& device) {
  if (params.dropout_p > 0 || params.s_dmask != nullptr) return false;
  const int64_t rows = packed_rows(params);
  if (params.batch == 0 || rows == 0) return false;
  // Beyond a tile of rows the forward kernel reads keys less often, unless it would leave most of
  // the machine idle.
  constexpr int64_t kMaxRows = 64, kForwardTile = 128, kLongKeys = 2048;
  if (rows <= kMaxRows) return true;
  if (params.num_splits > 0) {  // nor does this then depend on the batch
    return params.num_splits > 1 && rows <= 4 * kMaxRows && most_visible_keys(params) >= kLongKeys;
  }
  const int64_t forward_blocks =
      params.batch * params.num_heads * ceil_div(params.seqlen_q, kForwardTile);
  return forward_blocks * 4 <= device.num_multiprocessors && most_visible_keys(params) >= kLongKeys;
}

// Positions and blocks are 32-bit numbers in the kernel.
bool fits(const DecodePlan& plan) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;
  return plan.args.params.seqlen_k <= kMost && plan.args.num_rows <= kMost &&
         plan.shape.blocks <= kMost;
}

int choose_splits(const ForwardParams& params, int64_t items, int64_t units) {
  const int64_t keys = most_visible_keys(params);
  const int splits = plan_splits(items, keys, units);
  // One sequence may be much longer than the others, which is not known here: what a block reads is
  // bounded, at a cost of less than a hundredth.
  constexpr int64_t kMostKeys = 16384;
  const bool lengths_vary = params.seqused_k != nullptr || params.cu_seqlens_k != nullptr;
  if (!lengths_vary) return splits;
  return static_cast<int>(std::clamp<int64_t>(ceil_div(keys, kMostKeys), splits, kMaxSplits));
}

// FLASH_ATTN_PLUS_DECODE_TILES="streams,step_keys,stages,min_blocks,num_splits"; 0 leaves a number
// as it is.
void override_choice(DecodeSpec& spec, int& num_splits) {
  static const TuningVariable variable("FLASH_ATTN_PLUS_DECODE_TILES");
  int given[5];
  if (!variable.read(given)) return;
  int* const fields[] = {&spec.streams, &spec.step_keys, &spec.stages, &spec.min_blocks,
                         &num_splits};
  for (int i = 0; i < 5; ++i) {
    if (given[i] > 0) *fields[i] = given[i];
  }
}

size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

void DecodePlan::set_workspace(void* workspace) {
  const size_t rows = static_cast<size_t>(args.num_rows) * args.num_splits;
  args.partial_out = static_cast<float*>(workspace);
  args.partial_rows = reinterpret_cast<PartialRow*>(
      static_cast<char*>(workspace) + padded(rows * static_cast<size_t>(spec.head_dim) * 4));
}

std::optional<DecodePlan> plan_decode(const ForwardParams& params, const DeviceProperties& device) {
  if (!serves(params, device)) return std::nullopt;
  DecodeSpec spec = choose(kind_of(params, device), device);
  int wanted_splits = params.num_splits;
  override_choice(spec, wanted_splits);
  DecodePlan plan;
  plan.spec = spec;
  plan.args.params = params;
  // Without a page there is no key, whatever the table says.
  if (params.block_table != nullptr && params.num_pages == 0) plan.args.params.seqlen_k = 0;
  const int64_t rows = packed_rows(params);
  const int64_t row_tiles = ceil_div(rows, spec.tile_m);
  const int64_t items = params.batch * params.num_heads_k * row_tiles;
  const int64_t units = int64_t{device.num_multiprocessors} * spec.min_blocks;
  const int num_splits =
      wanted_splits > 0 ? std::min(wanted_splits, kMaxSplits) : choose_splits(params, items, units);
  plan.args.num_row_tiles = static_cast<uint32_t>(row_tiles);
  plan.args.num_splits = static_cast<uint32_t>(num_splits);
  plan.args.num_rows = params.batch * params.num_heads_k * rows;
  plan.shape = {items * num_splits, spec.threads(), spec.shared_bytes()};
  plan.combine_spec.dtype = spec.dtype;
  plan.combine_spec.head_dim = spec.head_dim;
  plan.combine_spec.access = spec.access;
  if (num_splits > 1) {
    plan.combine_shape = {plan.args.num_rows, plan.combine_spec.threads(), 0, device.arch >= 90};
    const size_t parts = static_cast<size_t>(plan.args.num_rows) * static_cast<size_t>(num_splits);
    plan.workspace_bytes =
        padded(parts * static_cast<size_t>(spec.head_dim) * 4) + padded(parts * sizeof(PartialRow));
  }
  return fits(plan) ? std::optional(plan) : std::nullopt;
}

std::vector<DecodeSpec> all_decode_specs(const DeviceProperties& device) {
  std::vector<DecodeSpec> specs;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int head_dim : kTileHeadDims) {
      for (const Access access : {Access::kWhole, Access::kPadded, Access::kElement}) {
        for (const bool paged : {false, true}) {
          for (const bool transformed : {false, true}) {
            for (const int64_t rows : {16, 32, 64}) {
              for (const bool one_wave : {false, true}) {
                const DecodeSpec spec =
                    choose({dtype, head_dim, access, paged, transformed, rows, one_wave}, device);
                if (std::find(specs.begin(), specs.end(), spec) == specs.end()) {
                  specs.push_back(spec);
                }
              }
            }
          }
        }
      }
    }
  }
  return specs;
}

std::vector<CombineSpec> all_combine_specs(const DeviceProperties&) {
  std::vector<CombineSpec> specs;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const int head_dim : kTileHeadDims) {
      for (const Access access : {Access::kWhole, Access::kPadded, Access::kElement}) {
        specs.push_back({dtype, head_dim, access});
      }
    }
  }
  return specs;
}

}  // namespace flash_attn_plus::cuda
