// What the fake driver has seen, and what it shall do; found by dlsym.
#pragma once

struct FakeDriverState {
  int libraries;  // loaded and not unloaded
  int launches;
  int device;  // of the last launch, and so on
  unsigned blocks, threads, shared_bytes;
  void* stream;
  char entry[64];
};

using FakeDriverStateFunction = FakeDriverState();
// The next call of `function` returns `result`.
using FakeDriverFailFunction = void(const char* function, int result);
// Contexts on this thread's stack.
using FakeDriverContextsFunction = int();
