// What a call would launch, for people.
#pragma once

#include <string>

#include "flash_attn_plus/attention.h"

namespace flash_attn_plus::cuda {

// Throws Error for whatever the call itself would be refused for.
std::string explain(const fap_cuda_explain_args& args);

}  // namespace flash_attn_plus::cuda
