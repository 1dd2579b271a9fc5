#include "attention/split.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flash_attn_plus {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the number of units does not count: parts long enough that starting and merging them is
// lost in the time to read them.
constexpr int64_t kKeysPerSplit = 1024;

// What a part costs beside its keys, in keys: start-up, tail, writing and merging its result.
constexpr int64_t kSplitCost = 128;

}  // namespace

int plan_splits(int64_t num_items, int64_t num_keys, int64_t num_units) {
  if (num_units <= 0) {
    return static_cast<int>(std::clamp<int64_t>(ceil_div(num_keys, kKeysPerSplit), 1, kMaxSplits));
  }
  // The time of the longest unit, in keys, is waves * (keys of a part + cost); the fewest parts
  // that reach the least of it.
  const int64_t most =
      std::clamp<int64_t>(std::min(ceil_div(num_keys, kSplitGranule), num_units), 1, kMaxSplits);
  const int64_t items = std::max<int64_t>(num_items, 1);
  int best = 1;
  int64_t best_time = std::numeric_limits<int64_t>::max();
  for (int splits = 1; splits <= most; ++splits) {
    // More parts take at least their share of the units, which only grows.
    if (splits > 1 && items * (num_keys + splits * kSplitCost) >= best_time * num_units) break;
    const int64_t waves = ceil_div(items * splits, num_units);
    const int64_t keys = split_range({0, num_keys}, splits, 0).size();
    const int64_t time = waves * (keys + (splits == 1 ? 0 : kSplitCost));
    if (time < best_time) {
      best_time = time;
      best = splits;
    }
  }
  return best;
}

float merge_lse(const PartialSoftmax* parts, int num_parts, float* weights) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float max = -kInfinity;
  for (int i = 0; i < num_parts; ++i) {
    // Written so that a NaN is taken and kept.
    if (!(parts[i].max <= max)) max = parts[i].max;
    if (std::isnan(max)) break;
  }
  // Without a key every weight is exp(-inf - 0) = 0.
  const float shift = max == -kInfinity ? 0.0f : max;
  double sum = 0.0;
  for (int i = 0; i < num_parts; ++i) {
    weights[i] = std::exp(parts[i].max - shift);
    sum += static_cast<double>(weights[i]) * parts[i].sum;
  }
  if (max == -kInfinity) return -kInfinity;
  if (max == kInfinity) return kInfinity;  // the weights are NaN, as those of inf / inf are
  const double inverse = 1.0 / sum;
  for (int i = 0; i < num_parts; ++i) weights[i] = static_cast<float>(weights[i] * inverse);
  return static_cast<float>(max + std::log(sum));
}

}  // namespace flash_attn_plus
