// Backward on CUDA: prepare, the main kernel, convert, and the gradient of the sinks.
#include "cuda/plan/backward.h"

#include <cstdio>
#include <cstdlib>

#include "attention/error.h"
#include "cuda/cuda.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"

namespace flash_attn_plus::cuda {
namespace {

// FLASH_ATTN_PLUS_BACKWARD_TILES="tile_m,tile_n,num_warps,q_stages,do_stages,min_blocks" overrides
// the choice of tiles; benchmarks/tune_backward.py sets it.
const BackwardTiles* tiles_of_environment(BackwardTiles& tiles) {
  const char* text = std::getenv("FLASH_ATTN_PLUS_BACKWARD_TILES");
  if (text == nullptr || *text == '\0') return nullptr;
  if (std::sscanf(text, "%d,%d,%d,%d,%d,%d", &tiles.tile_m, &tiles.tile_n, &tiles.num_warps,
                  &tiles.q_stages, &tiles.do_stages, &tiles.min_blocks) != 6) {
    fail("FLASH_ATTN_PLUS_BACKWARD_TILES must be six numbers, but is \"", text, "\"");
  }
  return &tiles;
}

BackwardPlan plan_of(const BackwardParams& params, const DeviceProperties& device) {
  BackwardTiles tiles;
  return plan_backward(params, device, tiles_of_environment(tiles));
}

}  // namespace

size_t backward_workspace(const BackwardParams& params, int device) {
  return plan_of(params, device_properties(device)).workspace_bytes;
}

void backward(const BackwardParams& params, const Call& call) {
  const DeviceProperties& device = device_properties(call.device);
  BackwardPlan plan = plan_of(params, device);
  plan.set_workspace(call.workspace);
  const auto run = [&](const auto& spec, const LaunchShape& shape) {
    if (shape.blocks > 0) launch(kernel_for(spec, device), shape, call.stream, &plan.args);
  };
  run(plan.prepare, plan.prepare_shape);
  run(plan.main, plan.main_shape);
  run(plan.convert, plan.convert_shape);
  run(plan.sink, plan.sink_shape);
}

}  // namespace flash_attn_plus::cuda
