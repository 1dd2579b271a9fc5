#include "cpu/scratch.h"

#include <cstring>
#include <memory>
#include <new>

namespace flash_attn_plus::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Release {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
};

struct Scratch {
  std::unique_ptr<void, Release> memory;
  size_t size = 0;
};

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.size) {
    scratch.memory.reset();
    scratch.size = 0;
    scratch.memory.reset(::operator new(bytes, kAlignment));
    scratch.size = bytes;
  }
#if defined(FLASH_ATTN_PLUS_POISON_SCRATCH)
  std::memset(scratch.memory.get(), 0xFF, bytes);  // NaN in every type: what is not written shows
#endif
  return scratch.memory.get();
}

}  // namespace flash_attn_plus::cpu
