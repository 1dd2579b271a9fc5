#include "cuda/decode.h"

#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"

namespace flash_attn_plus::cuda {

void decode(DecodePlan plan, const Call& call) {
  const DeviceProperties& device = device_properties(call.device);
  plan.set_workspace(call.workspace);
  launch(kernel_for(plan.spec, device), plan.shape, call.stream, &plan.args);
  if (plan.combine_shape.blocks > 0) {
    launch(kernel_for(plan.combine_spec, device), plan.combine_shape, call.stream, &plan.args);
  }
}

}  // namespace flash_attn_plus::cuda
