// Which calls the decode kernel serves, and how: pure functions, no GPU is asked.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/decode.h"

namespace flash_attn_plus::cuda {

struct DecodePlan {
  DecodeSpec spec;
  LaunchShape shape;
  CombineSpec combine_spec;
  LaunchShape combine_shape;  // nothing is launched when the keys are not split
  DecodeArgs args;            // the pointers of the parts come from the workspace
  size_t workspace_bytes = 0;

  void set_workspace(void* workspace);
};

// Nothing when the call is one for the forward kernel: a tile of queries makes enough work of its
// keys there, or it is of a kind that decode does not serve (dropout).
std::optional<DecodePlan> plan_decode(const ForwardParams& params, const DeviceProperties& device);

// Every Spec that plan_decode can choose on a device.
std::vector<DecodeSpec> all_decode_specs(const DeviceProperties& device);
std::vector<CombineSpec> all_combine_specs(const DeviceProperties& device);

}  // namespace flash_attn_plus::cuda
