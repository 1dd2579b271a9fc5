// The CUDA backend: what the core calls. Every function expects validated parameters whose lengths
// and tables lie in device memory, and the context of the device to be current (the core sees to
// it). It launches on the given stream and returns; it allocates no device memory and waits for
// nothing.
#pragma once

#include <cstddef>

#include "attention/params.h"

namespace flash_attn_plus::cuda {

struct Call {
  int device = 0;              // ordinal
  void* stream = nullptr;      // CUstream
  void* workspace = nullptr;   // device memory, aligned to kWorkspaceAlignment, uninitialised
  size_t workspace_bytes = 0;  // at least what *_workspace() asks for
};

constexpr size_t kWorkspaceAlignment = 256;

size_t forward_workspace(const ForwardParams& params, int device);
void forward(const ForwardParams& params, const Call& call);

size_t backward_workspace(const BackwardParams& params, int device);
void backward(const BackwardParams& params, const Call& call);

// params.append.q_rotated and, when q is rotated, params.forward.q are left to kvcache(), which
// keeps the rotated queries in the workspace.
size_t kvcache_workspace(const KvCacheParams& params, int device);
void kvcache(const KvCacheParams& params, const Call& call);

void rotary(const RotaryParams& params, const Call& call);  // float32 too

}  // namespace flash_attn_plus::cuda
