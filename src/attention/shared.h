// Functions that kernels share. Those of several CPU instruction sets must not be left to the
// linker, which would keep one copy for all of them, so they are inlined everywhere; the same
// headers are compiled for GPUs, whose compiler is given <cstdint> and nothing else of the standard
// library.
#pragma once

#if defined(__CUDACC__)
#define FAP_SHARED __host__ __device__ __forceinline__
#else
#define FAP_SHARED [[gnu::always_inline]] inline
#endif

namespace flash_attn_plus {

template <typename T>
FAP_SHARED constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
FAP_SHARED constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace flash_attn_plus
