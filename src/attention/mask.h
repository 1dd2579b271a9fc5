// Mask geometry: which keys a query sees, and so which blocks of keys a block of queries needs. The
// one place where causal and window masks are decided; every backend asks here.
//
// Query i sees key j iff i + off - left <= j <= i + off + right with off = seqlen_k - seqlen_q,
// both ends included, a negative side being infinite. Causal is right = 0.
#pragma once

#include <cstdint>

#include "attention/shared.h"

namespace flash_attn_plus {

// A half-open range of rows or columns, empty when begin >= end.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  FAP_SHARED constexpr bool empty() const { return begin >= end; }
  FAP_SHARED constexpr int64_t size() const { return empty() ? 0 : end - begin; }
  constexpr bool operator==(const Range&) const = default;
};

struct Mask {
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t window_left = -1;   // -1: infinite
  int64_t window_right = -1;  // -1: infinite

  FAP_SHARED constexpr int64_t offset() const { return seqlen_k - seqlen_q; }

  // Keys that query i sees.
  FAP_SHARED constexpr Range visible_keys(int64_t i) const {
    const int64_t diagonal = i + offset();
    const int64_t begin = window_left < 0 ? 0 : max_of<int64_t>(0, diagonal - window_left);
    const int64_t end =
        window_right < 0 ? seqlen_k : min_of<int64_t>(seqlen_k, diagonal + window_right + 1);
    return {begin, max_of(begin, end)};
  }

  // Keys that at least one of the queries sees: both bounds grow with the row.
  FAP_SHARED constexpr Range any_visible_keys(Range queries) const {
    if (queries.empty()) return {0, 0};
    const Range first = visible_keys(queries.begin);
    const Range last = visible_keys(queries.end - 1);
    return {first.begin, max_of(first.begin, last.end)};
  }

  // Keys that all of the queries see: no mask is needed inside.
  FAP_SHARED constexpr Range all_visible_keys(Range queries) const {
    if (queries.empty()) return {0, 0};
    const Range first = visible_keys(queries.begin);
    const Range last = visible_keys(queries.end - 1);
    return {last.begin, max_of(last.begin, first.end)};
  }

  // Queries that see at least one of the keys.
  FAP_SHARED constexpr Range any_seeing_queries(Range keys) const {
    if (keys.empty()) return {0, 0};
    const int64_t begin =
        window_right < 0 ? 0 : max_of<int64_t>(0, keys.begin - offset() - window_right);
    const int64_t end =
        window_left < 0 ? seqlen_q : min_of<int64_t>(seqlen_q, keys.end - offset() + window_left);
    return {begin, max_of(begin, end)};
  }

  // Queries that see all of the keys.
  FAP_SHARED constexpr Range all_seeing_queries(Range keys) const {
    if (keys.empty()) return {0, 0};
    const int64_t begin =
        window_right < 0 ? 0 : max_of<int64_t>(0, keys.end - 1 - offset() - window_right);
    const int64_t end = window_left < 0
                            ? seqlen_q
                            : min_of<int64_t>(seqlen_q, keys.begin - offset() + window_left + 1);
    return {begin, max_of(begin, end)};
  }
};

}  // namespace flash_attn_plus
