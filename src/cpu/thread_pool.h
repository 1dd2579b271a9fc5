// The CPU backend's threads: those of the OpenMP runtime that the process has loaded (torch's), or
// else a process-wide pool that grows on demand, sleeps when idle, can be used from several threads
// at once (their jobs share the workers), and starts afresh in a forked child.
#pragma once

#include <cstdint>
#include <type_traits>

namespace flash_attn_plus::cpu {

// A reference to a callable void(int64_t index, int worker); valid as long as the callable is.
class TaskRef {
 public:
  template <typename F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
  TaskRef(F&& callable)  // NOLINT: implicit, so that a lambda can be passed
      : object_(const_cast<void*>(static_cast<const void*>(&callable))),
        call_([](void* object, int64_t index, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(object))(index, worker);
        }) {}

  void operator()(int64_t index, int worker) const { call_(object_, index, worker); }

 private:
  void* object_;
  void (*call_)(void*, int64_t, int);
};

// Calls task(index, worker) once for every index in [0, num_tasks), indices handed out in
// increasing order to the caller (worker 0) and at most num_threads - 1 others, each with a worker
// number below num_threads of its own. num_threads 0 means as many as there are cores. Returns when
// all calls have returned; the first exception that one of them threw is thrown again here.
void parallel_for(int num_threads, int64_t num_tasks, TaskRef task);

// Cores that this process may run on.
int num_available_cores();

}  // namespace flash_attn_plus::cpu
