#include "cuda/plan/tuning.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "attention/error.h"

namespace flash_attn_plus::cuda {

TuningVariable::TuningVariable(const char* name)
    : name_(name), exists_(std::getenv(name) != nullptr) {}

bool TuningVariable::read(std::span<int> numbers) const {
  const char* variable = exists_ ? std::getenv(name_) : nullptr;
  if (variable == nullptr || *variable == '\0') return false;
  std::string_view text = variable;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), numbers[i]);
    text.remove_prefix(static_cast<size_t>(end - text.data()));
    const bool last = i + 1 == numbers.size();
    if (error != std::errc() || (last ? !text.empty() : !text.starts_with(','))) {
      fail(name_, " must be ", numbers.size(), " numbers with commas between them, but is \"",
           variable, "\"");
    }
    if (!last) text.remove_prefix(1);
  }
  return true;
}

}  // namespace flash_attn_plus::cuda
