// Chooses the instruction set, once per process.
#include <cstdlib>

#include "attention/error.h"
#include "cpu/cpu.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flash_attn_plus::cpu {

#define FAP_DECLARE(isa)    \
  namespace isa {           \
  const Kernels& kernels(); \
  }
FAP_DECLARE(portable)
#if defined(__x86_64__)
FAP_DECLARE(avx2)
FAP_DECLARE(avx512)
FAP_DECLARE(avx512_bf16)
FAP_DECLARE(amx_bf16)
#endif
#undef FAP_DECLARE

namespace {

struct Isa {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runnable)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The tile registers are switched on for a process on request only.
bool has_amx_bf16() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

// The best first.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx_bf16", &amx_bf16::kernels, &has_amx_bf16},
    {"avx512_bf16", &avx512_bf16::kernels, &has_avx512_bf16},
    {"avx512", &avx512::kernels, &has_avx512},
    {"avx2", &avx2::kernels, &has_avx2},
#endif
    {"portable", &portable::kernels, &always},
};

struct Selection {
  std::string name;
  const Kernels* kernels;
};

Selection select() {
  const char* wanted = std::getenv("FLASH_ATTN_PLUS_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string known;
  for (const Isa& isa : kIsas) {
    if (!known.empty()) known += ", ";
    known += isa.name;
    if (!any && std::string(wanted) != isa.name) continue;
    if (isa.runnable()) return {isa.name, &isa.kernels()};
    if (!any) fail("FLASH_ATTN_PLUS_CPU_ISA is \"", wanted, "\", which this CPU cannot run");
  }
  fail("FLASH_ATTN_PLUS_CPU_ISA must be one of ", known, ", but is \"", wanted, "\"");
}

const Selection& selection() {
  static const Selection selection = select();
  return selection;
}

}  // namespace

const std::vector<std::string>& runnable_isas() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) {
      if (isa.runnable()) names.emplace_back(isa.name);
    }
    return names;
  }();
  return names;
}

const std::string& selected_isa() { return selection().name; }

const Kernels& selected_kernels() { return *selection().kernels; }

void forward(const ForwardParams& params) { selected_kernels().forward(params); }
void backward(const BackwardParams& params) { selected_kernels().backward(params); }

}  // namespace flash_attn_plus::cpu
