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

// Bytes from row to row of a tile in shared memory; see kernels/tile.cuh.
FAP_SHARED constexpr int padded_row_bytes(int columns) { return (columns / 16 | 1) * 32; }

}  // namespace flash_attn_plus::cuda
