#include "cuda/plan/kind.h"

namespace flash_attn_plus::cuda {

int tile_head_dim(int64_t head_dim) {
  for (const int tile : kTileHeadDims) {
    if (head_dim <= tile) return tile;
  }
  return 0;  // validation lets no such call through
}

Access common_access(int64_t head_dim, std::initializer_list<const Operand*> operands) {
  constexpr int64_t kVector = 8;  // numbers in 16 bytes
  bool aligned = head_dim % kVector == 0;
  for (const Operand* x : operands) {
    aligned = aligned && reinterpret_cast<uintptr_t>(x->data) % 16 == 0 &&
              x->batch_stride % kVector == 0 && x->row_stride % kVector == 0 &&
              x->head_stride % kVector == 0;
  }
  if (!aligned) return Access::kElement;
  return head_dim == tile_head_dim(head_dim) ? Access::kWhole : Access::kPadded;
}

Masking masking_of(const AttentionParams& params) {
  if (params.window_left >= 0) return Masking::kWindow;
  return params.window_right >= 0 ? Masking::kCausal : Masking::kNone;
}

}  // namespace flash_attn_plus::cuda
