// What kernels are specialised on, shared by host and device: no sizes of a call, only kinds.
//
// A kernel has a struct of its own (spec/*.h), a plain one with a `visit` that names its fields: it
// is printed as one line of source above the kernel's text, and is the key of the cache and the
// line in the log.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace flash_attn_plus::cuda {

// How rows of q, k, v and out are read and written.
enum class Access : uint8_t {
  kWhole,    // 16 bytes at a time; the head dimension is the tile's
  kPadded,   // 16 bytes at a time; the head dimension, a multiple of 8, is less than the tile's
  kElement,  // one number at a time: any head dimension, stride and alignment
};

// Which keys a query sees, as far as the inner loop is concerned.
enum class Masking : uint8_t {
  kNone,    // all keys of its sequence
  kCausal,  // a bound on the right
  kWindow,  // bounds on both sides, either of which may be infinite
};

// Division of numbers below 2^31 by one that is known before the launch: a multiplication and a
// shift (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = 0;
  uint32_t shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t divisor) : divisor(divisor) {
    if (divisor <= 1) return;
    uint32_t bits = 0;  // of divisor - 1
    while ((uint64_t{1} << bits) < divisor) ++bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + divisor - 1) / divisor);
    shift = bits - 1;
  }

  FAP_SHARED uint32_t quotient(uint32_t x) const {
    return divisor == 1 ? x : static_cast<uint32_t>(uint64_t{x} * multiplier >> 32) >> shift;
  }
  FAP_SHARED uint32_t remainder(uint32_t x) const { return x - quotient(x) * divisor; }
};

// Bytes from row to row of a tile in shared memory; see kernels/tile.cuh.
FAP_SHARED constexpr int padded_row_bytes(int columns) { return (columns / 16 | 1) * 32; }

}  // namespace flash_attn_plus::cuda
