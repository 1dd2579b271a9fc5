#include "cuda/catalog.h"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <sstream>

#include "cuda/plan/backward.h"
#include "cuda/plan/decode.h"
#include "cuda/plan/forward.h"
#include "cuda/plan/rows.h"
#include "cuda/runtime/spec_text.h"
#include "cuda/spec/s_dmask.h"

namespace flash_attn_plus::cuda {
namespace {

template <typename Spec>
KernelLimits limits_of(const Spec& spec) {
  KernelLimits limits;
  if constexpr (requires { spec.shared_bytes(); }) limits.shared_bytes = spec.shared_bytes();
  if constexpr (requires { spec.threads(); }) {
    // So many registers that as many blocks of threads fit a multiprocessor as the Spec says.
    int blocks = 1;
    if constexpr (requires { spec.min_blocks; }) blocks = spec.min_blocks;
    limits.registers = std::min(255, 65536 / (spec.threads() * blocks) / 8 * 8);
  }
  if constexpr (requires { spec.max_registers(); }) limits.registers = spec.max_registers();
  if constexpr (requires { spec.max_stack_bytes(); }) limits.stack_bytes = spec.max_stack_bytes();
  if constexpr (requires { spec.max_spill_bytes(); }) limits.spill_bytes = spec.max_spill_bytes();
  return limits;
}

class Catalog {
 public:
  template <typename Spec>
  void add(const std::vector<Spec>& specs) {
    for (const Spec& spec : specs) {
      std::string text = to_text(spec);
      if (!texts_.insert(text).second) continue;
      entries_.push_back({{std::move(text), Spec::kKernel, Spec::kEntry}, limits_of(spec)});
    }
  }
  std::vector<CatalogEntry> take() { return std::move(entries_); }

 private:
  std::vector<CatalogEntry> entries_;
  std::set<std::string> texts_;
};

// The number before `words` in the log; 0 when they do not occur.
int number_before(const std::string& log, const std::string& words) {
  const size_t end = log.find(words);
  if (end == std::string::npos) return 0;
  const size_t before = log.find_last_not_of("0123456789", end - 1);
  return std::atoi(log.c_str() + (before == std::string::npos ? 0 : before + 1));
}

}  // namespace

std::vector<CatalogEntry> all_kernels(const DeviceProperties& device) {
  Catalog catalog;
  catalog.add(all_forward_specs(device));
  catalog.add<SDmaskSpec>({{DType::kFloat16}, {DType::kBFloat16}});
  const BackwardSpecs backward = all_backward_specs(device);
  catalog.add(backward.prepare);
  catalog.add(backward.main);
  catalog.add(backward.convert);
  catalog.add(backward.sink);
  catalog.add(all_decode_specs(device));
  catalog.add(all_combine_specs(device));
  catalog.add(all_append_specs());
  catalog.add(all_rotary_specs());
  return catalog.take();
}

KernelUse use_of(const std::string& log) {
  KernelUse use;
  use.stack_bytes = number_before(log, " bytes stack frame");
  use.spill_bytes = number_before(log, " bytes spill stores");
  use.shared_bytes = number_before(log, " bytes smem");
  const std::string used = "Used ";
  if (const size_t at = log.find(used); at != std::string::npos) {
    use.registers = std::atoi(log.c_str() + at + used.size());
  }
  return use;
}

std::string excess(const KernelUse& use, const KernelLimits& limits,
                   const DeviceProperties& device) {
  std::ostringstream text;
  const auto compare = [&](const char* what, int used, int limit) {
    if (used > limit)
      text << (text.tellp() > 0 ? ", " : "") << what << " " << used << " > " << limit;
  };
  compare("registers", use.registers, limits.registers);
  compare("stack bytes", use.stack_bytes, limits.stack_bytes);
  compare("spilled bytes", use.spill_bytes, limits.spill_bytes);
  compare("shared bytes", use.shared_bytes + limits.shared_bytes, device.max_shared_per_block);
  return text.str();
}

}  // namespace flash_attn_plus::cuda
