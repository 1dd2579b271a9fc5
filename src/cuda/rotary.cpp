#include "cuda/cuda.h"
#include "cuda/plan/rows.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"

namespace flash_attn_plus::cuda {

void rotary(const RotaryParams& params, const Call& call) {
  const DeviceProperties& device = device_properties(call.device);
  const RotaryPlan plan = plan_rotary(params, device);
  if (plan.shape.blocks == 0) return;
  launch(kernel_for(plan.spec, device), plan.shape, call.stream, &plan.args);
}

}  // namespace flash_attn_plus::cuda
