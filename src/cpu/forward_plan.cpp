#include "cpu/forward_plan.h"

#include <algorithm>
#include <vector>

#include "attention/sequence.h"

namespace flash_attn_plus::cpu {

struct ForwardPlan::State {
  std::vector<ForwardTask> tasks;
  Range unused;
};

namespace {

constexpr int64_t kMinTaskRows = 64;
// So many tasks keep some tens of cores busy; beyond that, larger ones read the keys less often.
constexpr int64_t kWantedTasks = 32;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries of one task, for so many heads at a time: a power of two, so that a vector of rows is
// within one head wherever it can be.
int64_t queries_per_task(int64_t task_rows, int64_t num_heads) {
  int64_t queries = 1;
  while (2 * queries * num_heads <= task_rows) queries *= 2;
  return queries;
}

}  // namespace

ForwardPlan::ForwardPlan(const ForwardParams& params, int64_t decode_rows) : state_(new State) {
  const int64_t group = params.group_size();
  int64_t total_queries = 0;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    total_queries += sequence_at(params, batch).seqlen_q;
  }
  const int64_t task_rows =
      std::clamp(total_queries * params.num_heads / kWantedTasks, kMinTaskRows, kMaxTaskRows);
  const int64_t heads_per_task = std::min(group, task_rows);
  const int64_t queries_per_task_ = queries_per_task(task_rows, heads_per_task);

  struct Weighed {
    ForwardTask task;
    int64_t work;
  };
  std::vector<Weighed> weighed;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    const Sequence sequence = sequence_at(params, batch);
    if (sequence.seqlen_q * group <= decode_rows) continue;
    const Mask mask = sequence.mask(params);
    for (int64_t begin = 0; begin < sequence.seqlen_q; begin += queries_per_task_) {
      const Range queries = {begin, std::min(begin + queries_per_task_, sequence.seqlen_q)};
      const int64_t keys = mask.any_visible_keys(queries).size();
      for (int64_t head_k = 0; head_k < params.num_heads_k; ++head_k) {
        for (int64_t first = 0; first < group; first += heads_per_task) {
          ForwardTask task = {batch, head_k * group + first,
                              std::min(heads_per_task, group - first), queries};
          weighed.push_back({task, task.num_rows() * keys});
        }
      }
    }
  }
  std::stable_sort(weighed.begin(), weighed.end(),
                   [](const Weighed& a, const Weighed& b) { return a.work > b.work; });
  state_->tasks.reserve(weighed.size());
  for (const Weighed& w : weighed) state_->tasks.push_back(w.task);

  if (params.cu_seqlens_q != nullptr) {
    state_->unused = {params.cu_seqlens_q[params.batch], params.total_q};
  }
}

ForwardPlan::~ForwardPlan() { delete state_; }

int64_t ForwardPlan::num_tasks() const { return static_cast<int64_t>(state_->tasks.size()); }
const ForwardTask& ForwardPlan::task(int64_t index) const { return state_->tasks[index]; }
Range ForwardPlan::unused_rows() const { return state_->unused; }

}  // namespace flash_attn_plus::cpu
