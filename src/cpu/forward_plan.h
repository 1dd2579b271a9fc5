// How a forward call is cut into tasks: a function of the shapes alone.
//
// A task is a block of queries of all heads that share a key head (or of as many of them as make
// kMaxTaskRows rows): the rows of a group read the same keys, which are packed once for all of
// them. Tasks are sorted by the work in them, most first, so that the last ones to finish are
// short.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "attention/params.h"

namespace flash_attn_plus::cpu {

struct ForwardTask {
  int64_t batch = 0;
  int64_t head = 0;       // first query head
  int64_t num_heads = 0;  // all with the same key head
  Range queries;          // within the sequence
  int64_t num_rows() const { return num_heads * queries.size(); }
};

class ForwardPlan {
 public:
  static constexpr int64_t kMaxTaskRows = 512;

  // Sequences of at most `decode_rows` query rows a key head are left to decode(). Throws
  // std::bad_alloc.
  ForwardPlan(const ForwardParams& params, int64_t decode_rows);
  ~ForwardPlan();
  ForwardPlan(const ForwardPlan&) = delete;
  ForwardPlan& operator=(const ForwardPlan&) = delete;

  int64_t num_tasks() const;
  const ForwardTask& task(int64_t index) const;

  // Rows of q that belong to no sequence, where lengths vary.
  Range unused_rows() const;

 private:
  struct State;
  State* state_;
};

}  // namespace flash_attn_plus::cpu
