// Which backward kernels serve a call, and how they are launched. Pure functions: no GPU is asked.
#pragma once

#include <cstddef>
#include <vector>

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/backward.h"

namespace flash_attn_plus::cuda {

// Sizes of tiles, and what follows from them for shared memory; see BackwardSpec.
struct BackwardTiles {
  int tile_m, tile_n, num_warps, q_stages, do_stages, min_blocks;
};

struct BackwardPlan {
  BackwardPrepareSpec prepare;
  BackwardSpec main;
  BackwardConvertSpec convert;
  BackwardSinkSpec sink;
  LaunchShape prepare_shape, main_shape, convert_shape, sink_shape;  // sink: no blocks without one
  BackwardArgs args;  // the pointers into the workspace are left to set_workspace()
  size_t counters_offset = 0;
  size_t workspace_bytes = 0;

  void set_workspace(void* workspace);
};

// `tiles`: to be used instead of those chosen, for tuning.
BackwardPlan plan_backward(const BackwardParams& params, const DeviceProperties& device,
                           const BackwardTiles* tiles = nullptr);

// Everything that plan_backward can choose on a device.
struct BackwardSpecs {
  std::vector<BackwardPrepareSpec> prepare;
  std::vector<BackwardSpec> main;
  std::vector<BackwardConvertSpec> convert;
  std::vector<BackwardSinkSpec> sink;
};
BackwardSpecs all_backward_specs(const DeviceProperties& device);

}  // namespace flash_attn_plus::cuda
