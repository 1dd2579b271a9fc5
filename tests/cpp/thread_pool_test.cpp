#include "cpu/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/scratch.h"

namespace flash_attn_plus::cpu {
namespace {

int64_t sum_of_squares(int num_threads, int64_t count) {
  std::atomic<int64_t> sum{0};
  parallel_for(num_threads, count, [&](int64_t index, int) { sum += index * index; });
  return sum;
}

TEST(ThreadPoolTest, EveryIndexIsHandedOutOnce) {
  for (const int num_threads : {0, 1, 2, 3, 8}) {
    for (const int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<size_t>(count));
      std::atomic<bool> numbers_in_range{true};
      const int limit = num_threads > 0 ? num_threads : num_available_cores();
      parallel_for(num_threads, count, [&](int64_t index, int worker) {
        ++seen[static_cast<size_t>(index)];
        if (worker < 0 || worker >= limit) numbers_in_range = false;
      });
      for (const auto& times : seen) EXPECT_EQ(times, 1);
      EXPECT_TRUE(numbers_in_range);
    }
  }
}

TEST(ThreadPoolTest, SeveralThreadsMayUseItAtOnce) {
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 200; ++round) right += sum_of_squares(3, 50) == 40425;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 6 * 200);
}

TEST(ThreadPoolTest, TasksMayThemselvesBeParallel) {
  std::atomic<int64_t> sum{0};
  parallel_for(3, 8, [&](int64_t, int) { sum += sum_of_squares(3, 50); });
  EXPECT_EQ(sum, 8 * 40425);
}

TEST(ThreadPoolTest, AnExceptionReachesTheCallerAndThePoolGoesOn) {
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(parallel_for(3, 100,
                              [](int64_t index, int) {
                                if (index == 17) throw std::runtime_error("task");
                              }),
                 std::runtime_error);
    EXPECT_EQ(sum_of_squares(3, 50), 40425);
  }
}

TEST(ThreadPoolTest, WorksInAForkedChild) {
  ASSERT_EQ(sum_of_squares(3, 50), 40425);
  const pid_t child = fork();
  if (child == 0) _exit(sum_of_squares(3, 50) == 40425 ? 0 : 1);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(sum_of_squares(3, 50), 40425);
}

TEST(ScratchTest, IsAlignedAndEachThreadsOwn) {
  void* mine = thread_scratch(100);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(mine) % 64, 0u);
  EXPECT_EQ(thread_scratch(50), mine);
  void* other = nullptr;
  std::thread([&] { other = thread_scratch(100); }).join();
  EXPECT_NE(other, nullptr);
}

}  // namespace
}  // namespace flash_attn_plus::cpu
