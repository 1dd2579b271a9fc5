// Splitting the keys of a query into parts that are computed apart, and putting the parts together.
//
// Decode has few query rows and many keys: one block of queries is too little work for a machine,
// so its keys are split, each part gives an output and a log-sum-exp of its own, and the parts are
// merged by their log-sum-exps, always in the order of the keys. Device-free: every backend plans
// here.
#pragma once

#include <cstdint>

#include "attention/mask.h"
#include "attention/shared.h"

namespace flash_attn_plus {

// Parts begin at multiples of this from the first key.
constexpr int64_t kSplitGranule = 64;
constexpr int kMaxSplits = 128;

// The number of parts into which `num_keys` keys are split, from 1 to kMaxSplits.
//
// num_items: blocks of queries (over batch, heads and rows) that are independent anyway;
// num_units: how many of them the device runs at once, e.g. multiprocessors times occupancy. 0: a
// device of any number of units, such as a CPU; then the answer depends on num_keys alone, so that
// a sequence's result depends neither on the other sequences of its batch nor on the machine.
int plan_splits(int64_t num_items, int64_t num_keys, int64_t num_units);

// The keys of one part: equal parts of `keys`, rounded up to kSplitGranule; the last ones may be
// empty.
FAP_SHARED constexpr Range split_range(Range keys, int num_splits, int split) {
  const int64_t per_split = (keys.size() + num_splits - 1) / num_splits;
  const int64_t rounded = (per_split + kSplitGranule - 1) / kSplitGranule * kSplitGranule;
  const int64_t end = max_of(keys.begin, keys.end);
  return {min_of(keys.begin + split * rounded, end),
          min_of(keys.begin + (split + 1) * rounded, end)};
}

// A part of a softmax: the sum of the exponentials of its scores is sum * exp(max). A log-sum-exp
// is {lse, 1}; a part without keys is {-inf, 0}.
struct PartialSoftmax {
  float max;
  float sum;
};

// The log-sum-exp of all parts. weights[i] is what the output of part i, unnormalised (the sum of
// exp(score - max) * v, which is the output itself when the sum is 1), counts in the merged output.
// NaN propagates. Without any key the result is -inf and all weights are 0.
float merge_lse(const PartialSoftmax* parts, int num_parts, float* weights);

}  // namespace flash_attn_plus
