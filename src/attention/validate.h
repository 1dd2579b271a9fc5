// From the C ABI's tensors to parameters: everything that can be wrong with a call is found here,
// once, before anything is computed. Throws Error or ConstraintError.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/params.h"
#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {

ForwardParams validate(const fap_forward_args& args);
BackwardParams validate(const fap_backward_args& args);
RotaryParams validate(const fap_rotary_args& args);

// The cache function is an append followed by a forward over the longer cache.
struct KvCacheParams {
  bool appends = false;  // there are new keys
  AppendParams append;   // q_rotated is left to the caller, who owns that buffer
  ForwardParams forward;
  std::vector<int32_t> seqused_k;  // forward.seqused_k, when new keys were given
};
KvCacheParams validate(const fap_kvcache_args& args);

}  // namespace flash_attn_plus
