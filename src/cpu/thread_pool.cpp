#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define FAP_HAS_FORK 1
#endif

namespace flash_attn_plus::cpu {
namespace {

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// To wake a thread takes 15 to 50 microseconds, as long as a small attention takes in all. So
// whoever waits looks around for a while first, yielding its core to anyone who wants it: calls
// that follow each other closely find the workers awake.
constexpr std::chrono::microseconds kSpin{100};

template <typename Done>
bool spin_until(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Job {
  Job(TaskRef task, int64_t num_tasks, int num_workers)
      : task(task), num_tasks(num_tasks), num_workers(num_workers) {}

  const TaskRef task;
  const int64_t num_tasks;
  const int num_workers;
  std::atomic<int64_t> next{0};

  // Changed under the pool's mutex only.
  int joined = 1;              // workers that have taken a number, the caller included
  std::atomic<int> active{0};  // workers at work, the caller not counted
  std::exception_ptr error;

  bool exhausted() const { return next.load(std::memory_order_relaxed) >= num_tasks; }

  // Runs tasks until none is left; returns what a task threw.
  std::exception_ptr work(int worker) {
    try {
      for (;;) {
        const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
        if (index >= num_tasks) return nullptr;
        task(index, worker);
      }
    } catch (...) {
      next.store(num_tasks, std::memory_order_relaxed);
      return std::current_exception();
    }
  }
};

class ThreadPool {
 public:
  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      grow(job.num_workers - 1);
      jobs_.push_back(&job);
      num_posted_.fetch_add(1, std::memory_order_release);
    }
    for (int i = 1; i < job.num_workers; ++i) work_available_.notify_one();
    std::exception_ptr error = job.work(0);

    std::unique_lock lock(mutex_);
    std::erase(jobs_, &job);
    if (job.active != 0) {
      lock.unlock();
      spin_until([&] { return job.active.load(std::memory_order_relaxed) == 0; });
      lock.lock();  // a worker lets go of the job when it lets go of the mutex
    }
    job_finished_.wait(lock, [&] { return job.active == 0; });
    if (error == nullptr) error = job.error;
    lock.unlock();
    if (error != nullptr) std::rethrow_exception(error);
  }

 private:
  // Threads are detached and the pool is never destroyed: a worker may be asleep when the process
  // ends, and there is nothing that it would have to put in order.
  void grow(int num_threads) {
    for (; num_threads_ < num_threads; ++num_threads_)
      std::thread([this] { worker_loop(); }).detach();
  }

  Job* find_job() const {
    for (Job* job : jobs_) {
      if (job->joined < job->num_workers && !job->exhausted()) return job;
    }
    return nullptr;
  }

  void worker_loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Job* job = find_job();
      if (job == nullptr) {
        const uint64_t seen = num_posted_.load(std::memory_order_relaxed);
        lock.unlock();
        spin_until([&] { return num_posted_.load(std::memory_order_acquire) != seen; });
        lock.lock();
        work_available_.wait(lock, [&] { return (job = find_job()) != nullptr; });
      }
      const int worker = job->joined++;
      ++job->active;
      lock.unlock();
      std::exception_ptr error = job->work(worker);
      lock.lock();
      if (error != nullptr && job->error == nullptr) job->error = error;
      if (--job->active == 0) job_finished_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_available_;
  std::condition_variable job_finished_;
  std::vector<Job*> jobs_;  // jobs that may still have tasks, oldest first
  std::atomic<uint64_t> num_posted_{0};
  int num_threads_ = 0;
};

std::atomic<ThreadPool*> current_pool{nullptr};
std::atomic<bool> forked{false};

// A forked child has none of its parent's threads, and their pools may be locked: leave them.
void start_afresh() {
  current_pool.store(nullptr);
  forked.store(true);
}

void register_fork_handler() {
#if defined(FAP_HAS_FORK)
  static const int registered = pthread_atfork(nullptr, nullptr, start_afresh);
  static_cast<void>(registered);
#endif
}

ThreadPool& pool() {
  ThreadPool* pool = current_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  auto* fresh = new ThreadPool;
  if (current_pool.compare_exchange_strong(pool, fresh)) return *fresh;
  delete fresh;  // another thread was first, and this one has started no threads
  return *pool;
}

// An OpenMP runtime's `#pragma omp parallel`.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads,
                                unsigned flags);

// That of the runtime that the process has loaded already, such as torch's; null when there is
// none. Its threads spin for milliseconds after each of torch's operations, and threads of our own
// would have to share the cores with them. OpenMP does not outlive a fork.
ParallelRegion loaded_openmp() {
#if defined(FAP_HAS_FORK)
  static const auto region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load(std::memory_order_relaxed) ? nullptr : region;
#else
  return nullptr;
#endif
}

// The region has as many threads as torch's have, whatever the number of tasks: a runtime ends
// threads that a smaller region does not need.
void run_on_openmp(ParallelRegion region, Job& job, int num_threads) {
  struct Shared {
    Job& job;
    const std::thread::id caller = std::this_thread::get_id();
    std::atomic<int> joined{1};
    std::mutex mutex{};
    std::exception_ptr error{};
  } shared{job};
  const auto body = [](void* data) {
    Shared& shared = *static_cast<Shared*>(data);
    const bool is_caller = std::this_thread::get_id() == shared.caller;
    const int worker = is_caller ? 0 : shared.joined.fetch_add(1, std::memory_order_relaxed);
    if (worker >= shared.job.num_workers) return;
    if (std::exception_ptr error = shared.job.work(worker)) {
      std::lock_guard lock(shared.mutex);
      if (shared.error == nullptr) shared.error = error;
    }
  };
  region(body, &shared, static_cast<unsigned>(num_threads), 0);
  if (shared.error != nullptr) std::rethrow_exception(shared.error);
}

}  // namespace

int num_available_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void parallel_for(int num_threads, int64_t num_tasks, TaskRef task) {
  if (num_threads <= 0) num_threads = num_available_cores();
  const int num_workers = static_cast<int>(std::min<int64_t>(num_threads, num_tasks));
  if (num_workers <= 1) {
    for (int64_t index = 0; index < num_tasks; ++index) task(index, 0);
    return;
  }
  register_fork_handler();
  Job job(task, num_tasks, num_workers);
  if (const ParallelRegion region = loaded_openmp()) {
    run_on_openmp(region, job, num_threads);
  } else {
    pool().run(job);
  }
}

}  // namespace flash_attn_plus::cpu
