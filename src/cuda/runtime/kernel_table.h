// The kernels of one kind of Spec that this process has used.
#pragma once

#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "cuda/runtime/device.h"
#include "cuda/runtime/spec_text.h"

namespace flash_attn_plus::cuda {

struct Kernel {
  void* handle = nullptr;  // CUkernel: belongs to no context
  std::string name;        // its Spec and device, for messages
};

// What is compiled: the names of a Spec, which see kernel.h.
struct KernelSource {
  std::string spec;  // to_text()
  const char* kernel;
  const char* entry;
};

// From the disk, else compiled. Throws Error with what failed, the Spec and the device.
Kernel load_kernel(const KernelSource& source, const DeviceProperties& device);

template <typename Spec>
class KernelTable {
 public:
  const Kernel& find(const Spec& spec, const DeviceProperties& device) {
    const Key key{spec, device.ordinal};
    const Kernel* kernel = find_loaded(key);
    if (kernel == nullptr) {
      // One at a time, while lookups of others go on. A failure leaves nothing behind.
      const std::lock_guard building(building_);
      kernel = find_loaded(key);
      if (kernel == nullptr) {
        Kernel loaded = load_kernel({to_text(spec), Spec::kKernel, Spec::kEntry}, device);
        const std::unique_lock lock(mutex_);
        kernel = &kernels_.emplace(key, std::move(loaded)).first->second;
      }
    }
    return *kernel;
  }

 private:
  struct Key {
    Spec spec;
    int device;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return SpecHash<Spec>{}(key.spec) * 31 + static_cast<size_t>(key.device);
    }
  };

  const Kernel* find_loaded(const Key& key) const {
    const std::shared_lock lock(mutex_);
    const auto found = kernels_.find(key);
    return found == kernels_.end() ? nullptr : &found->second;
  }

  mutable std::shared_mutex mutex_;
  std::mutex building_;
  std::unordered_map<Key, Kernel, Hash> kernels_;
};

}  // namespace flash_attn_plus::cuda
