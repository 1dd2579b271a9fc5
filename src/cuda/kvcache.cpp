// The cache function: the append, then forward over the longer cache.
#include "cuda/cuda.h"
#include "cuda/plan/rows.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/kernel.h"

namespace flash_attn_plus::cuda {
namespace {

bool rotates_queries(const KvCacheParams& params) {
  return params.appends && params.append.rotary_cos != nullptr;
}

// Rotated queries, (b, sq, h, d) without gaps, come first in the workspace.
size_t rotated_bytes(const KvCacheParams& params) {
  if (!rotates_queries(params)) return 0;
  const AppendParams& append = params.append;
  const int64_t elements = append.batch * append.seqlen_q * append.num_heads * append.head_dim;
  const size_t bytes = static_cast<size_t>(elements) * sizeof(uint16_t);
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// The call with its buffer of rotated queries.
KvCacheParams with_rotated(KvCacheParams params, void* rotated) {
  if (rotates_queries(params)) {
    AppendParams& append = params.append;
    const int64_t row = append.num_heads * append.head_dim;
    append.q_rotated = {rotated, append.seqlen_q * row, row, append.head_dim};
    params.forward.q = append.q_rotated;
  }
  return params;
}

}  // namespace

size_t kvcache_workspace(const KvCacheParams& params, int device) {
  return rotated_bytes(params) + forward_workspace(with_rotated(params, nullptr).forward, device);
}

void kvcache(const KvCacheParams& given, const Call& call) {
  const KvCacheParams params = with_rotated(given, call.workspace);
  if (params.appends) {
    const DeviceProperties& device = device_properties(call.device);
    const AppendPlan plan = plan_append(params.append);
    if (plan.shape.blocks > 0) {
      launch(kernel_for(plan.spec, device), plan.shape, call.stream, &plan.args);
    }
  }
  Call rest = call;
  const size_t used = rotated_bytes(params);
  if (used > 0) {
    rest.workspace = static_cast<char*>(call.workspace) + used;
    rest.workspace_bytes -= used;
  }
  forward(params.forward, rest);
}

}  // namespace flash_attn_plus::cuda
