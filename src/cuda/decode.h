// The decode kernel and, where keys are split, the one that merges its parts.
#pragma once

#include "cuda/cuda.h"
#include "cuda/plan/decode.h"

namespace flash_attn_plus::cuda {

// plan.workspace_bytes of call.workspace are used.
void decode(DecodePlan plan, const Call& call);

}  // namespace flash_attn_plus::cuda
