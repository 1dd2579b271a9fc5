// From the C ABI's tensors to parameters: everything that can be wrong with a call is found here,
// once, before anything is computed, but whether this build serves the device, which check_device()
// says. Throws Error or ConstraintError.
#pragma once

#include "attention/params.h"
#include "flash_attn_plus/attention.h"

namespace flash_attn_plus {

ForwardParams validate(const fap_forward_args& args);
BackwardParams validate(const fap_backward_args& args);
RotaryParams validate(const fap_rotary_args& args);
KvCacheParams validate(const fap_kvcache_args& args);

}  // namespace flash_attn_plus
