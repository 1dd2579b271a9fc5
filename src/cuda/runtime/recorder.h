// Launches written down instead of made, to say what a call would do: with it operations need no
// driver, no compiler and no GPU.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "cuda/runtime/kernel_table.h"

namespace flash_attn_plus::cuda {

struct RecordedLaunch {
  std::string kernel;  // its Spec
  int64_t blocks;
  int threads;
  int shared_bytes;
};

// While one lives, this thread's kernels are not loaded and its launches come here.
class LaunchRecorder {
 public:
  LaunchRecorder() : outer_(current_) { current_ = this; }
  ~LaunchRecorder() { current_ = outer_; }
  LaunchRecorder(const LaunchRecorder&) = delete;
  LaunchRecorder& operator=(const LaunchRecorder&) = delete;

  static LaunchRecorder* current() { return current_; }

  const Kernel& kernel(std::string name) {
    return kernels_.emplace_back(Kernel{nullptr, std::move(name)});
  }
  void add(RecordedLaunch launch) { launches_.push_back(std::move(launch)); }
  const std::vector<RecordedLaunch>& launches() const { return launches_; }

 private:
  inline static thread_local LaunchRecorder* current_ = nullptr;

  LaunchRecorder* outer_;
  std::deque<Kernel> kernels_;
  std::vector<RecordedLaunch> launches_;
};

}  // namespace flash_attn_plus::cuda
