// Which forward kernel serves a call, and how it is launched. Pure functions: no GPU is asked.
#pragma once

#include <vector>

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/forward.h"

namespace flash_attn_plus::cuda {

struct ForwardPlan {
  ForwardSpec spec;
  ForwardArgs args;
  LaunchShape shape;
};

ForwardPlan plan_forward(const ForwardParams& params, const DeviceProperties& device);

// Every Spec that plan_forward can choose on a device.
std::vector<ForwardSpec> all_forward_specs(const DeviceProperties& device);

}  // namespace flash_attn_plus::cuda
