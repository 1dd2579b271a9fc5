// Numbers that measurements put in the place of a planner's choice, by a variable of the
// environment; benchmarks/tune_*.py set them.
#pragma once

#include <span>

namespace flash_attn_plus::cuda {

class TuningVariable {
 public:
  // Looks whether there is such a variable at all: only a process that has it when it first plans
  // looks at it again, so that others need not at every call.
  explicit TuningVariable(const char* name);

  // Reads as many numbers, separated by commas; whether there are any (an empty text has none).
  // Throws when the text is anything else.
  bool read(std::span<int> numbers) const;

 private:
  const char* name_;
  bool exists_;
};

}  // namespace flash_attn_plus::cuda
