// Backward on CUDA: prepare, the main kernel, convert, and the gradient of the sinks.
#include "cuda/plan/backward.h"

#include "cuda/cuda.h"
#include "cuda/plan/tuning.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"

namespace flash_attn_plus::cuda {
namespace {

// FLASH_ATTN_PLUS_BACKWARD_TILES="tile_m,tile_n,num_warps,q_stages,do_stages,min_blocks" overrides
// the choice of tiles.
const BackwardTiles* tiles_of_environment(BackwardTiles& tiles) {
  static const TuningVariable variable("FLASH_ATTN_PLUS_BACKWARD_TILES");
  int given[6];
  if (!variable.read(given)) return nullptr;
  tiles = {given[0], given[1], given[2], given[3], given[4], given[5]};
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
