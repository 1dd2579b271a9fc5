#include "cuda/plan/rows.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace flash_attn_plus::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// 16 bytes at a time can be read from every row.
bool aligned(const void* data, int64_t size, std::initializer_list<int64_t> strides) {
  bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) all = all && stride * size % 16 == 0;
  return all;
}
bool aligned(const Operand& x, int64_t size) {
  return aligned(x.data, size, {x.batch_stride, x.row_stride, x.head_stride});
}

// Whether the parts of a row are made of whole vectors of 16 bytes.
bool divides(int64_t rotary_dim, int64_t head_dim, int width) {
  return rotary_dim / 2 % width == 0 && head_dim % width == 0;
}

// Rows of `units` units for a block: a few units for each thread, and no more blocks than a grid
// has in `rows` rows of each of `batch` sequences.
int64_t rows_per_block(int64_t rows, int64_t units, int64_t batch) {
  constexpr int64_t kUnitsPerBlock = 2 * kRowThreads, kMostBlocks = 1 << 28;
  const int64_t wanted = kUnitsPerBlock / std::max<int64_t>(units, 1);
  return std::max({wanted, ceil_div(rows * batch, kMostBlocks), int64_t{1}});
}

}  // namespace

RotaryPlan plan_rotary(const RotaryParams& params, const DeviceProperties& device) {
  RotaryPlan plan;
  RotarySpec& spec = plan.spec;
  spec.dtype = params.dtype;
  spec.table_dtype = params.table_dtype;
  spec.interleaved = params.interleaved;
  const int64_t size = size_of(params.dtype), table_size = size_of(params.table_dtype);
  spec.vector = divides(params.rotary_dim, params.head_dim, row_width(params.dtype, true)) &&
                aligned(params.x, size) && aligned(params.out, size) &&
                aligned(params.cos, table_size, {params.cos_stride}) &&
                aligned(params.sin, table_size, {params.sin_stride});
  plan.args.params = params;
  const int64_t units = (params.head_dim - params.rotary_dim / 2) / spec.width() * params.num_heads;
  const int64_t rows = rows_per_block(params.seqlen, units, params.batch);
  const int64_t blocks = std::max<int64_t>(ceil_div(params.seqlen, rows), 1);
  plan.args.rows_per_block = static_cast<uint32_t>(rows);
  plan.args.blocks_per_sequence = static_cast<uint32_t>(blocks);
  plan.shape = {params.num_heads == 0 ? 0 : params.batch * blocks, kRowThreads, 0};
  if (params.cu_seqlens != nullptr) {  // rows of no sequence are copied, if there is none at all
    plan.shape.blocks = std::max<int64_t>(
        plan.shape.blocks, std::min<int64_t>(params.total_rows, device.num_multiprocessors));
  }
  return plan;
}

AppendPlan plan_append(const AppendParams& params) {
  AppendPlan plan;
  AppendSpec& spec = plan.spec;
  spec.dtype = params.dtype;
  spec.rotates = params.rotary_cos != nullptr;
  spec.interleaved = spec.rotates && params.rotary_interleaved;
  const int64_t size = size_of(params.dtype);
  spec.vector = divides(params.rotary_dim, params.head_dim, row_width(params.dtype, true)) &&
                aligned(params.k, size) && aligned(params.v, size) &&
                aligned(params.k_cache, size) && aligned(params.v_cache, size);
  if (spec.rotates) {
    spec.vector = spec.vector && aligned(params.q, size) && aligned(params.q_rotated, size) &&
                  aligned(params.rotary_cos, size, {params.rotary_cos_stride}) &&
                  aligned(params.rotary_sin, size, {params.rotary_sin_stride});
  }
  plan.args.params = params;
  const int64_t units = (params.head_dim - params.rotary_dim / 2) / spec.width();
  const int64_t new_rows =
      rows_per_block(params.seqlen_new, units * params.num_heads_k, params.batch);
  plan.args.new_rows_per_block = static_cast<uint32_t>(new_rows);
  plan.args.new_blocks = static_cast<uint32_t>(ceil_div(params.seqlen_new, new_rows));
  if (spec.rotates) {
    const int64_t q_rows = rows_per_block(params.seqlen_q, units * params.num_heads, params.batch);
    plan.args.q_rows_per_block = static_cast<uint32_t>(q_rows);
    plan.args.q_blocks = static_cast<uint32_t>(ceil_div(params.seqlen_q, q_rows));
  }
  plan.shape = {params.batch * (2 * int64_t{plan.args.new_blocks} + plan.args.q_blocks),
                kRowThreads, 0};
  return plan;
}

std::vector<RotarySpec> all_rotary_specs() {
  std::vector<RotarySpec> specs;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    for (const bool interleaved : {false, true}) {
      for (const bool vector : {false, true}) {
        specs.push_back({dtype, dtype, interleaved, vector});
        if (dtype != DType::kFloat32) {
          specs.push_back({dtype, DType::kFloat32, interleaved, vector});
        }
      }
    }
  }
  return specs;
}

std::vector<AppendSpec> all_append_specs() {
  std::vector<AppendSpec> specs;
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    for (const bool vector : {false, true}) {
      specs.push_back({dtype, false, false, vector});
      specs.push_back({dtype, true, false, vector});
      specs.push_back({dtype, true, true, vector});
    }
  }
  return specs;
}

}  // namespace flash_attn_plus::cuda
