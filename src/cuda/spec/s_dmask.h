// The S_dmask kernel's specialisation and argument.
#pragma once

#include "cuda/spec.h"

namespace flash_attn_plus::cuda {

struct SDmaskSpec {
  static constexpr const char* kKernel = "s_dmask";
  static constexpr const char* kEntry = "attention_s_dmask";

  DType dtype = DType::kBFloat16;

  FAP_SHARED constexpr int threads() const { return 256; }
  constexpr int max_stack_bytes() const { return 16; }  // a random block, indexed by the column

  constexpr bool operator==(const SDmaskSpec&) const = default;
  template <typename F>
  constexpr void visit(F&& field) const {
    field("dtype", dtype);
  }
};

struct SDmaskArgs {
  ForwardParams params;
};

}  // namespace flash_attn_plus::cuda
