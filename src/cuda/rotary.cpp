#include "attention/error.h"
#include "cuda/cuda.h"

namespace flash_attn_plus::cuda {

void rotary(const RotaryParams&, const Call&) { fail("rotary is not served on CUDA yet"); }

}  // namespace flash_attn_plus::cuda
