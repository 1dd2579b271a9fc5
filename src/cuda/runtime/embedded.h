// The sources of the kernels, which the build puts into the library as text (cmake/embed.cmake).
#pragma once

#include <string_view>
#include <vector>

namespace flash_attn_plus::cuda {

struct EmbeddedText {
  std::string_view name;  // as it is included, e.g. "cuda/spec/forward.h"
  std::string_view text;
};

const std::vector<EmbeddedText>& embedded_texts();

}  // namespace flash_attn_plus::cuda
