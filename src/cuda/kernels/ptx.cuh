// The instructions that kernels are made of: thin names over PTX, and nothing else.
//
// Device code includes only this project's headers and <cstdint>, which the run-time compiler is
// given as text: it needs no CUDA headers.
#pragma once

#include <cstdint>

#include "attention/params.h"

#define FAP_DEVICE __device__ __forceinline__

namespace flash_attn_plus::cuda {

// A value that a generic lambda can branch on when it is compiled.
template <bool kValue>
struct Constant {
  FAP_DEVICE constexpr operator bool() const { return kValue; }
};

constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// ---- numbers ----------------------------------------------------------------

FAP_DEVICE float exp2_approx(float x) {  // relative error 2^-22; 0 for -inf
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FAP_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FAP_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to 16 bits, `low` in the lower half.
template <DType kType>
FAP_DEVICE uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (kType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}
template <DType kType>
FAP_DEVICE uint16_t pack1(float x) {
  return static_cast<uint16_t>(pack2<kType>(x, 0.0f));
}

template <DType kType>
FAP_DEVICE float unpack1(uint16_t x) {
  float y;
  if constexpr (kType == DType::kBFloat16) {
    y = __uint_as_float(static_cast<uint32_t>(x) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  }
  return y;
}
template <DType kType>
FAP_DEVICE void unpack2(uint32_t packed, float& low, float& high) {
  if constexpr (kType == DType::kBFloat16) {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xFFFF0000u);
  } else {
    low = unpack1<kType>(static_cast<uint16_t>(packed));
    high = unpack1<kType>(static_cast<uint16_t>(packed >> 16));
  }
}

// ---- shared memory ----------------------------------------------------------

FAP_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory behind the thread's back, or writes zeros there.
FAP_DEVICE void copy_async16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
// Copies 4 bytes by way of the L1 cache.
FAP_DEVICE void copy_async4(uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(destination), "l"(source)
               : "memory");
}
FAP_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most so many of the thread's latest groups are under way.
template <int kPending>
FAP_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

FAP_DEVICE void store_shared(uint32_t address, uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
FAP_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
FAP_DEVICE void store_shared(uint32_t address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y)
               : "memory");
}
FAP_DEVICE uint32_t load_shared4(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
FAP_DEVICE float2 load_shared8(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
FAP_DEVICE void store_shared16(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
FAP_DEVICE uint4 load_shared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Four 8x8 matrices of 16-bit numbers: lanes 8 i to 8 i + 7 give the addresses of the rows of
// matrix i (16 bytes each); a thread receives of each the two numbers (lane / 4, 2 (lane % 4) + {0,
// 1}), or of its transpose.
FAP_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
FAP_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// The other way round: a thread gives of each matrix what it would receive. Compute capability 9.0.
#if __CUDA_ARCH__ >= 900
FAP_DEVICE void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}
#endif

// ---- memory that blocks of threads share ------------------------------------

FAP_DEVICE void add_to_memory(float* target, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(target), "f"(x) : "memory");
}
#if __CUDA_ARCH__ >= 900
FAP_DEVICE void add_to_memory4(float* target, const float (&x)[4]) {  // 16-byte aligned
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
#endif
// What was written before an add_release() is seen by who reads its result with load_acquire(); a
// barrier in between extends both to the whole block.
FAP_DEVICE void add_release(uint32_t* target, uint32_t x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(target), "r"(x) : "memory");
}
FAP_DEVICE uint32_t load_acquire(const uint32_t* source) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(source) : "memory");
  return x;
}

// ---- tensor cores -----------------------------------------------------------

// d (16x8, float32) += a (16x16) b (16x8). With g = lane / 4, t = lane % 4 a thread holds
//   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   a: pairs of columns (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8)
//   b: pairs of rows (2t, g) (2t+8, g)
template <DType kType>
FAP_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == DType::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- threads ----------------------------------------------------------------

FAP_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
// The same in all lanes, and known to be: what depends on it stays in uniform registers.
FAP_DEVICE int warp_id() { return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0); }

// A kernel that is launched early (LaunchShape::early) may start when all blocks of the one before
// it have let it, and waits for that one's end and results. Nothing otherwise, or before 9.0.
FAP_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FAP_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Barrier `id` (0 is that of __syncthreads) for so many threads of the block.
FAP_DEVICE void sync_threads(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Over the four lanes that hold a row of an accumulator.
FAP_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
FAP_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

}  // namespace flash_attn_plus::cuda
