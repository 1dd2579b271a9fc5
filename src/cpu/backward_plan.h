// How a backward call is cut into tasks, and the dQ accumulators that tasks share.
//
// A task owns one block of keys of one (sequence, key head): it visits every block of queries that
// sees one of them, keeps dK and dV to itself, and adds its part of dQ to an accumulator that the
// tasks of the other key blocks add to as well. At every block of queries they take turns in the
// order of their keys, so the sum does not depend on who runs when. The key block is the slowest
// index of a task's number and the pool hands tasks out in increasing order: whoever a task waits
// for has started already, so waiting always ends, and with fewer threads than sequences times
// heads it hardly ever begins.
//
// Everything here is a function of the shapes alone. Memory: one float32 dQ, none where one key
// block serves a sequence, and a counter for each block of queries.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"

namespace flash_attn_plus::cpu {

// Some keys or queries of one sequence.
struct BackwardBlock {
  int64_t batch = 0;
  int64_t index = 0;  // of its kind within the sequence
  Range rows;         // within the sequence
  int64_t begin = 0;  // first row within data + batch * batch_stride
};

class BackwardPlan {
 public:
  // A row of the accumulator has accumulator_dim floats. Throws std::bad_alloc.
  BackwardPlan(const BackwardParams& params, int64_t block_m, int64_t block_n,
               int64_t accumulator_dim);
  ~BackwardPlan();
  BackwardPlan(const BackwardPlan&) = delete;
  BackwardPlan& operator=(const BackwardPlan&) = delete;

  // The key blocks of all sequences, each number of a block before the next. Those of a sequence
  // without keys are not among them.
  int64_t num_key_blocks() const;
  BackwardBlock key_block(int64_t number) const;

  // The query blocks that see one of the keys of a block, as a range of indices. The first begins
  // at the first query of the sequence that sees a key.
  Range query_blocks(const BackwardBlock& keys) const;
  BackwardBlock query_block(const BackwardBlock& keys, int64_t index) const;

  // Every query of every sequence, in pieces, for what is done once a row.
  int64_t num_query_pieces() const;
  BackwardBlock query_piece(int64_t number) const;
  // Queries of a sequence that see a key.
  Range seeing_queries(int64_t batch) const;

  // Rows that belong to no sequence or lie beyond its keys in use; `begin` counts as above.
  int64_t num_unused_q() const;
  BackwardBlock unused_q(int64_t number) const;
  int64_t num_unused_k() const;
  BackwardBlock unused_k(int64_t number) const;

  // One turn at the accumulator of one query block and head.
  struct Turn {
    float* accumulator = nullptr;  // block_m rows; null when no other turn shares it
    void* counter = nullptr;
    int32_t index = 0;  // turns before this one
    bool first = true;
    bool last = true;
  };
  Turn turn(const BackwardBlock& keys, const BackwardBlock& queries, int64_t head) const;
  // Returns when all turns before this one have passed; false when one of them never will.
  bool wait(const Turn& turn) const;
  void pass(const Turn& turn) const;
  // Says that a turn will never pass.
  void abandon() const;

 private:
  struct State;
  State* state_;
};

}  // namespace flash_attn_plus::cpu
