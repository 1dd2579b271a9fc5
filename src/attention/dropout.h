// The dropout function: a pure function of (seed, offset, batch, query head, row, column), one and
// the same on every backend. docs/numerics.md defines it; this header is that definition in C++.
//
// A Philox-4x32 block of 7 rounds gives four 32-bit words, that is eight 16-bit numbers, for the
// two rows r, r + 8 and the four columns c, c + 8, c + 16, c + 24: the entries that a thread of a
// tensor-core kernel holds, and eight consecutive columns of a row for a CPU's vector.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "attention/shared.h"

namespace flash_attn_plus {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxBlock {
  uint32_t word[4];
  constexpr bool operator==(const PhiloxBlock&) const = default;
};
struct PhiloxKey {
  uint32_t word[2] = {0, 0};
};

// Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
FAP_SHARED constexpr PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * counter.word[0];
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key.word[0],
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key.word[1],
                static_cast<uint32_t>(product0)}};
    key.word[0] += kPhiloxWeyl0;
    key.word[1] += kPhiloxWeyl1;
  }
  return counter;
}

struct Dropout {
  PhiloxKey key;
  uint32_t threshold = 65536;  // an entry is kept iff its 16-bit number is below
  float scale = 1.0f;          // 1 / (1 - p)

  FAP_SHARED constexpr bool enabled() const { return threshold < 65536; }
};

// Below this probability dropout is off (diffusers passes 1e-30 to get the log-sum-exp).
constexpr double kMinDropoutP = 1.0 / (1 << 20);

// One Philox block turns (seed, offset) into the key of the call.
FAP_SHARED Dropout make_dropout(double p, uint64_t seed, uint64_t offset) {
  Dropout dropout;
  if (!(p >= kMinDropoutP)) return dropout;
  const PhiloxBlock block =
      philox({{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0}},
             {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}});
  dropout.key = {{block.word[0], block.word[1]}};
  dropout.threshold = static_cast<uint32_t>((1.0 - p) * 65536.0 + 0.5);
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

FAP_SHARED Dropout make_dropout(const AttentionParams& params) {
  if (params.rng_state == nullptr) return {};
  return make_dropout(params.dropout_p, static_cast<uint64_t>(params.rng_state[0]),
                      static_cast<uint64_t>(params.rng_state[1]));
}

// Counters of the block that holds (row, column): word 0 and word 1.
FAP_SHARED constexpr uint32_t dropout_row_counter(int64_t row) {
  return static_cast<uint32_t>((row >> 4) * 8 + (row & 7));
}
FAP_SHARED constexpr uint32_t dropout_column_counter(int64_t column) {
  return static_cast<uint32_t>((column >> 5) * 8 + (column & 7));
}

// The 16-bit number of one entry.
FAP_SHARED constexpr uint32_t dropout_number(const Dropout& dropout, int64_t batch, int64_t head,
                                             int64_t row, int64_t column) {
  const PhiloxBlock block = philox({{dropout_row_counter(row), dropout_column_counter(column),
                                     static_cast<uint32_t>(head), static_cast<uint32_t>(batch)}},
                                   dropout.key);
  const uint32_t word = block.word[(column >> 3) & 3];
  return (row & 8) ? word >> 16 : word & 0xFFFFu;
}

FAP_SHARED constexpr bool dropout_keeps(const Dropout& dropout, int64_t batch, int64_t head,
                                        int64_t row, int64_t column) {
  return dropout_number(dropout, batch, head, row, column) < dropout.threshold;
}

}  // namespace flash_attn_plus
