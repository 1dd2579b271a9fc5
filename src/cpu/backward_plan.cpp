#include "cpu/backward_plan.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "attention/sequence.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flash_attn_plus::cpu {
namespace {

constexpr int64_t kPieceRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for one call, in huge pages where the system has them: every page is touched for the first
// time, and then again and again from far apart.
constexpr std::align_val_t kAlignment{size_t{2} << 20};

struct Release {
  void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
};

float* allocate_floats(int64_t count) {
  const size_t bytes = sizeof(float) * count;
  void* memory = ::operator new(bytes, kAlignment);
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);  // a hint
#endif
  return static_cast<float*>(memory);
}

// What is known of one sequence.
struct SequencePlan {
  Sequence sequence;
  Mask mask;
  Range queries;                 // those that see a key
  int64_t num_query_blocks = 0;  // of them
  int64_t num_key_blocks = 0;
  int64_t first_counter = 0;      // of head 0
  int64_t first_accumulator = 0;  // row of head 0; meaningful when there are several key blocks
};

}  // namespace

struct BackwardPlan::State {
  int64_t block_m, block_n, accumulator_dim;
  std::vector<SequencePlan> sequences;
  std::vector<BackwardBlock> key_blocks, query_pieces, unused_q, unused_k;
  std::unique_ptr<float, Release> accumulators;
  std::vector<std::atomic<int32_t>> counters;
  std::atomic<bool> abandoned{false};
};

namespace {

// Rows [0, total) of a packed axis less those of its sequences, or what a sequence leaves of its
// own.
void add_unused(std::vector<BackwardBlock>& unused, int64_t batch, int64_t begin, int64_t end) {
  if (begin < end) unused.push_back({batch, 0, {0, end - begin}, begin});
}

}  // namespace

BackwardPlan::BackwardPlan(const BackwardParams& params, int64_t block_m, int64_t block_n,
                           int64_t accumulator_dim) {
  auto state = std::make_unique<State>();
  state->block_m = block_m;
  state->block_n = block_n;
  state->accumulator_dim = accumulator_dim;
  int64_t num_counters = 0, num_accumulator_rows = 0, max_key_blocks = 0;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    SequencePlan plan;
    plan.sequence = sequence_at(params, batch);
    const Sequence& sequence = plan.sequence;
    plan.mask = sequence.mask(params);
    plan.queries = plan.mask.any_seeing_queries({0, sequence.seqlen_k});
    plan.num_query_blocks = ceil_div(plan.queries.size(), block_m);
    plan.num_key_blocks = ceil_div(sequence.seqlen_k, block_n);
    plan.first_counter = num_counters;
    plan.first_accumulator = num_accumulator_rows;
    if (plan.num_key_blocks > 1) {
      num_counters += plan.num_query_blocks * params.num_heads;
      num_accumulator_rows += plan.num_query_blocks * params.num_heads * block_m;
    }
    max_key_blocks = std::max(max_key_blocks, plan.num_key_blocks);
    state->sequences.push_back(plan);

    for (int64_t row = 0; row < sequence.seqlen_q; row += kPieceRows) {
      const Range rows{row, std::min(row + kPieceRows, sequence.seqlen_q)};
      state->query_pieces.push_back({batch, row / kPieceRows, rows, sequence.q_begin + row});
    }
    const int64_t k_end =
        params.cu_seqlens_k != nullptr ? params.cu_seqlens_k[batch + 1] : params.seqlen_k;
    add_unused(state->unused_k, batch, sequence.k_begin + sequence.seqlen_k, k_end);
  }
  if (params.cu_seqlens_q != nullptr) {
    add_unused(state->unused_q, 0, 0, params.cu_seqlens_q[0]);
    add_unused(state->unused_q, 0, params.cu_seqlens_q[params.batch], params.total_q);
  }
  if (params.cu_seqlens_k != nullptr) {
    add_unused(state->unused_k, 0, 0, params.cu_seqlens_k[0]);
    add_unused(state->unused_k, 0, params.cu_seqlens_k[params.batch], params.total_k);
  }
  for (int64_t block = 0; block < max_key_blocks; ++block) {
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      const SequencePlan& plan = state->sequences[batch];
      if (block >= plan.num_key_blocks) continue;
      const Range rows{block * block_n, std::min((block + 1) * block_n, plan.sequence.seqlen_k)};
      state->key_blocks.push_back({batch, block, rows, plan.sequence.k_begin + rows.begin});
    }
  }
  if (num_accumulator_rows > 0) {
    state->accumulators.reset(allocate_floats(num_accumulator_rows * accumulator_dim));
  }
  state->counters = std::vector<std::atomic<int32_t>>(num_counters);
  state_ = state.release();
}

BackwardPlan::~BackwardPlan() { delete state_; }

int64_t BackwardPlan::num_key_blocks() const { return state_->key_blocks.size(); }
BackwardBlock BackwardPlan::key_block(int64_t number) const { return state_->key_blocks[number]; }
int64_t BackwardPlan::num_query_pieces() const { return state_->query_pieces.size(); }
BackwardBlock BackwardPlan::query_piece(int64_t number) const {
  return state_->query_pieces[number];
}
int64_t BackwardPlan::num_unused_q() const { return state_->unused_q.size(); }
BackwardBlock BackwardPlan::unused_q(int64_t number) const { return state_->unused_q[number]; }
int64_t BackwardPlan::num_unused_k() const { return state_->unused_k.size(); }
BackwardBlock BackwardPlan::unused_k(int64_t number) const { return state_->unused_k[number]; }

Range BackwardPlan::seeing_queries(int64_t batch) const { return state_->sequences[batch].queries; }

Range BackwardPlan::query_blocks(const BackwardBlock& keys) const {
  const SequencePlan& plan = state_->sequences[keys.batch];
  const Range queries = plan.mask.any_seeing_queries(keys.rows);
  if (queries.empty()) return {0, 0};
  return {(queries.begin - plan.queries.begin) / state_->block_m,
          ceil_div(queries.end - plan.queries.begin, state_->block_m)};
}

BackwardBlock BackwardPlan::query_block(const BackwardBlock& keys, int64_t index) const {
  const SequencePlan& plan = state_->sequences[keys.batch];
  const int64_t begin = plan.queries.begin + index * state_->block_m;
  const Range rows{begin, std::min(begin + state_->block_m, plan.queries.end)};
  return {keys.batch, index, rows, plan.sequence.q_begin + begin};
}

BackwardPlan::Turn BackwardPlan::turn(const BackwardBlock& keys, const BackwardBlock& queries,
                                      int64_t head) const {
  const SequencePlan& plan = state_->sequences[keys.batch];
  if (plan.num_key_blocks == 1) return {};
  const Range seen = plan.mask.any_visible_keys(queries.rows);
  const int64_t first = seen.begin / state_->block_n;
  const int64_t last = (seen.end - 1) / state_->block_n;
  if (first == last) return {};
  const int64_t block = head * plan.num_query_blocks + queries.index;
  const int64_t row = plan.first_accumulator + block * state_->block_m;
  return {state_->accumulators.get() + row * state_->accumulator_dim,
          &state_->counters[plan.first_counter + block], static_cast<int32_t>(keys.index - first),
          keys.index == first, keys.index == last};
}

bool BackwardPlan::wait(const Turn& turn) const {
  if (turn.first) return true;
  const auto& counter = *static_cast<std::atomic<int32_t>*>(turn.counter);
  while (counter.load(std::memory_order_acquire) != turn.index) {
    if (state_->abandoned.load(std::memory_order_relaxed)) return false;
    std::this_thread::yield();
  }
  return true;
}

void BackwardPlan::pass(const Turn& turn) const {
  if (turn.last) return;
  static_cast<std::atomic<int32_t>*>(turn.counter)
      ->store(turn.index + 1, std::memory_order_release);
}

void BackwardPlan::abandon() const { state_->abandoned.store(true, std::memory_order_relaxed); }

}  // namespace flash_attn_plus::cpu
