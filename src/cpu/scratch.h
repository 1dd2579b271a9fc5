// Memory that a kernel works in.
#pragma once

#include <cstddef>

namespace flash_attn_plus::cpu {

// At least so many bytes, aligned to 64, that belong to the calling thread; contents undefined. The
// next call on the same thread returns the same memory. Kept until the thread ends. Throws
// std::bad_alloc.
void* thread_scratch(size_t bytes);

}  // namespace flash_attn_plus::cpu
