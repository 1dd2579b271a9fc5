#include "cuda/plan/forward.h"

#include <algorithm>
#include <optional>

#include "cuda/cuda.h"
#include "cuda/decode.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"
#include "cuda/spec/s_dmask.h"

namespace flash_attn_plus::cuda {
namespace {

void write_s_dmask(const ForwardParams& params, const DeviceProperties& device, void* stream) {
  const SDmaskSpec spec{params.dtype};
  const SDmaskArgs args{params};
  const int64_t rows = params.batch * params.num_heads * params.s_dmask_rows;
  const int64_t blocks = std::min<int64_t>(rows, 64 * device.num_multiprocessors);
  launch(kernel_for(spec, device), {blocks, spec.threads(), 0}, stream, &args);
}

}  // namespace

size_t forward_workspace(const ForwardParams& params, int device) {
  const std::optional<DecodePlan> plan = plan_decode(params, device_properties(device));
  return plan ? plan->workspace_bytes : 0;
}

void forward(const ForwardParams& params, const Call& call) {
  const DeviceProperties& device = device_properties(call.device);
  if (std::optional<DecodePlan> plan = plan_decode(params, device)) {
    decode(*plan, call);
    return;
  }
  const ForwardPlan plan = plan_forward(params, device);
  launch(kernel_for(plan.spec, device), plan.shape, call.stream, &plan.args);
  if (params.s_dmask != nullptr) write_s_dmask(params, device, call.stream);
}

}  // namespace flash_attn_plus::cuda
