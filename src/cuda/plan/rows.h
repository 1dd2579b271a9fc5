// How the kernels that move rows are launched: rotary embedding, and the append to a cache.
#pragma once

#include <vector>

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/rotary.h"

namespace flash_attn_plus::cuda {

struct RotaryPlan {
  RotarySpec spec;
  RotaryArgs args;
  LaunchShape shape;
};
RotaryPlan plan_rotary(const RotaryParams& params, const DeviceProperties& device);

struct AppendPlan {
  AppendSpec spec;
  AppendArgs args;
  LaunchShape shape;
};
AppendPlan plan_append(const AppendParams& params);

// Every Spec that the planners can choose; the same on all devices.
std::vector<RotarySpec> all_rotary_specs();
std::vector<AppendSpec> all_append_specs();

}  // namespace flash_attn_plus::cuda
