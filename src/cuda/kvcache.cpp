#include "attention/error.h"
#include "cuda/cuda.h"

namespace flash_attn_plus::cuda {

size_t kvcache_workspace(const KvCacheParams& params, int device) {
  return forward_workspace(params.forward, device);
}

void kvcache(const KvCacheParams& params, const Call& call) {
  if (params.appends) fail("appending to a cache is not served on CUDA yet");
  forward(params.forward, call);
}

}  // namespace flash_attn_plus::cuda
