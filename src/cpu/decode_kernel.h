// Attention of few query rows over many keys, as in decoding with a cache.
//
// Bound by memory: keys and values are read once, in their own dtype, from where they lie, and all
// query rows of a group, which share a key head, are served by that one read. The work is cut into
// parts of the keys (attention/split.h) by groups of key heads. A part walks its keys in blocks of
// kDecodeBlock rows and through all of its heads before it goes to the next block: with the usual
// layout (row, head, d) that reads memory from one end to the other, where head by head it would
// come back to every page of memory once a head. While one (block, head) is computed the next one
// is prefetched.
//
// A block of scores: the dot products of kRows queries with kLanes / kRows keys at a time, one
// accumulator vector each, whose lanes are summed together by a transposing tree, so that no key
// needs a reduction of its own. Then an online softmax in float32, and the products with the
// values, whose accumulators stay in registers over the whole block.
//
// How a result is computed depends on its own sequence and num_splits alone: neither on the batch,
// nor on the number of threads, nor on how heads are grouped into tasks.
#pragma once

#include "attention/sequence.h"
#include "attention/split.h"
#include "cpu/decode_tile.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace flash_attn_plus::cpu::FAP_ISA {

// Bytes of keys and values below which a second thread costs more than it brings, and state of a
// task (queries and accumulators) that leaves most of the second-level cache to the keys.
inline constexpr int64_t kDecodeParallelBytes = 256 << 10;
inline constexpr int64_t kDecodeStateBytes = 512 << 10;

// The most query rows of a key head that are better served here than by the other kernel, which
// packs keys and values for products as fast as the instruction set has them (docs/cpu.md has the
// crossings); 0: none is. A function of the call, not of its sequences.
FAP_INLINE int64_t max_decode_rows(const ForwardParams& params) {
  if (params.dropout_p > 0.0) return 0;
#if defined(__AMX_BF16__)
  if (params.dtype == DType::kBFloat16) return 8;
  if (params.dtype == DType::kFloat16) return 16;
#elif defined(__AVX512BF16__)
  if (params.dtype == DType::kBFloat16) return 16;
#endif
  return 32;
}

// Whether decode() serves the sequences of this many queries.
FAP_INLINE bool is_decode_sequence(const ForwardParams& params, int64_t seqlen_q) {
  return seqlen_q * params.group_size() <= max_decode_rows(params);
}

// ---------------------------------------------------------------------------------------------------
// One block of keys

// The rows of a block in memory, in elements from the operand's data, head 0.
struct BlockRows {
  int count;
  int64_t k[kDecodeBlock];
  int64_t v[kDecodeBlock];
};

// Rows `keys` of a sequence, counted from its first valid one. Those that are missing in the last
// block repeat the last row: their scores are computed and thrown away.
FAP_INLINE void locate_rows(const ForwardParams& params, const Sequence& sequence, int64_t batch,
                            Range keys, BlockRows& rows) {
  rows.count = static_cast<int>(keys.size());
  const int64_t first = sequence.k_begin + keys.begin;
  if (params.block_table != nullptr) {
    const int32_t* table = params.block_table + batch * params.block_table_stride;
    int64_t page = first / params.page_size;
    int64_t slot = first % params.page_size;
    for (int j = 0; j < rows.count; ++j) {
      rows.k[j] = table[page] * params.k.batch_stride + slot * params.k.row_stride;
      rows.v[j] = table[page] * params.v.batch_stride + slot * params.v.row_stride;
      if (++slot == params.page_size) {
        slot = 0;
        ++page;
      }
    }
  } else {
    const int64_t k = key_row_offset(params, params.k, batch, first);
    const int64_t v = key_row_offset(params, params.v, batch, first);
    for (int j = 0; j < rows.count; ++j) {
      rows.k[j] = k + j * params.k.row_stride;
      rows.v[j] = v + j * params.v.row_stride;
    }
  }
  for (int j = rows.count; j < kDecodeBlock; ++j) {
    rows.k[j] = rows.k[rows.count - 1];
    rows.v[j] = rows.v[rows.count - 1];
  }
}

// What one task works on: some key heads of one part of one sequence.
struct DecodeTask {
  const ForwardParams& params;
  int64_t batch;
  Sequence sequence;
  Mask mask;
  int64_t
      num_rows;  // queries of a key head: row i * group_size + g is query i, head g of the group
  int64_t padded_rows;  // a multiple of the tiles
  int64_t padded_dim;   // a multiple of kPair
};

// One tile of rows, of which `rows` exist, against a block of keys of one key head. q and out are
// its first rows. The next block is prefetched on the way, where there is one.
template <int kRows, typename T>
__attribute__((noinline)) void decode_tile(const DecodeTask& task, int64_t head_k, int64_t row,
                                           int64_t first_key, int count, const T* const* keys,
                                           const T* const* values, const T* const* next_keys,
                                           const T* const* next_values, const float* q, float* out,
                                           PartialSoftmax* softmax) {
  const ForwardParams& params = task.params;
  const int rows = static_cast<int>(task.num_rows - row < kRows ? task.num_rows - row : kRows);
  constexpr int kKeys = kLanes / kRows;
  alignas(64) float scores[kRows * kDecodeBlock];
  for (int j = 0; j < count; j += kKeys) {
    score_tile<kRows>(q, task.padded_dim, keys + j, next_keys + j, params.head_dim, scores + j);
  }

  const int64_t group_size = params.group_size();
  bool uniform = true;
  int begins[kRows] = {}, ends[kRows] = {};
  for (int i = 0; i < rows; ++i) {
    const int64_t query = (row + i) / group_size;
    const int64_t head = head_k * group_size + (row + i) % group_size;
    const Range visible = task.mask.visible_keys(query);
    ScoreOptions options;
    options.softcap = params.softcap;
    options.slope = params.alibi_slopes == nullptr
                        ? 0.0f
                        : params.alibi_slopes[task.batch * params.alibi_batch_stride +
                                              head * params.alibi_head_stride];
    options.offset = static_cast<int32_t>(first_key - query - task.mask.offset());
    options.begin = static_cast<int>(std::clamp<int64_t>(visible.begin - first_key, 0, count));
    options.end = static_cast<int>(std::clamp<int64_t>(visible.end - first_key, 0, count));
    const float correction = softmax_block(scores + i * kDecodeBlock, options, softmax[i]);
    if (correction != 1.0f) {
      float* o = out + i * task.padded_dim;
      for (int64_t c = 0; c < task.padded_dim; c += kLanes) store(o + c, load(o + c) * correction);
    }
    begins[i] = options.begin;
    ends[i] = options.end;
    uniform = uniform && options.begin == begins[0] && options.end == ends[0];
  }

  if (uniform) {
    add_values<kRows>(scores, values, next_values, begins[0], ends[0], params.head_dim, out,
                      task.padded_dim);
    return;
  }
  // A row must not touch values that it does not see: they may be NaN.
  for (int i = 0; i < rows; ++i) {
    add_values<1>(scores + i * kDecodeBlock, values, next_values, begins[i], ends[i],
                  params.head_dim, out + i * task.padded_dim, task.padded_dim);
  }
}

// Pointers to the rows of one key head.
template <typename T>
FAP_INLINE void point_to_rows(const ForwardParams& params, const BlockRows& block, int64_t head_k,
                              const T** keys, const T** values) {
  const T* k = static_cast<const T*>(params.k.data) + head_k * params.k.head_stride;
  const T* v = static_cast<const T*>(params.v.data) + head_k * params.v.head_stride;
  for (int j = 0; j < kDecodeBlock; ++j) {
    keys[j] = k + block.k[j];
    values[j] = v + block.v[j];
  }
}

// All rows against a block of keys of one key head; the block that comes next is prefetched.
template <typename T>
FAP_INLINE void decode_block(const DecodeTask& task, int64_t head_k, int64_t first_key,
                             const BlockRows& block, const BlockRows& next_block,
                             int64_t next_head_k, const float* q, float* out,
                             PartialSoftmax* softmax) {
  const T *keys[kDecodeBlock], *values[kDecodeBlock];
  const T *next_keys[kDecodeBlock], *next_values[kDecodeBlock];
  point_to_rows(task.params, block, head_k, keys, values);
  point_to_rows(task.params, next_block, next_head_k, next_keys, next_values);
  for (int64_t row = 0; row < task.padded_rows;) {
    const int64_t left = task.padded_rows - row;
    const auto tile = left >= 4   ? &decode_tile<4, T>
                      : left == 2 ? &decode_tile<2, T>
                                  : &decode_tile<1, T>;
    // The first tile prefetches; for the others the next block is the one at hand.
    tile(task, head_k, row, first_key, block.count, keys, values, row == 0 ? next_keys : keys,
         row == 0 ? next_values : values, q + row * task.padded_dim, out + row * task.padded_dim,
         softmax + row);
    row += left >= 4 ? 4 : left;
  }
}

// ---------------------------------------------------------------------------------------------------
// One part of a sequence

constexpr int64_t padded_decode_rows(int64_t rows) { return rows <= 2 ? rows : (rows + 3) / 4 * 4; }

// The queries of one key head in float32, scaled, the padding 0.
template <typename T>
FAP_INLINE void load_queries(const DecodeTask& task, int64_t head_k, float* q) {
  const ForwardParams& params = task.params;
  const int64_t group_size = params.group_size();
  const T* data = static_cast<const T*>(params.q.data) + task.batch * params.q.batch_stride;
  for (int64_t row = 0; row < task.padded_rows; ++row) {
    const int64_t query = task.sequence.q_begin + row / group_size;
    const int64_t head = head_k * group_size + row % group_size;
    const T* x = data + query * params.q.row_stride + head * params.q.head_stride;
    for (int64_t c = 0; c < task.padded_dim; c += kPair) {
      const int64_t left = params.head_dim - c;
      VecPair value{};
      if (row < task.num_rows) {
        value = left >= kPair ? load_pair(x + c) : load_pair_partial(x + c, static_cast<int>(left));
      }
      store_pair(q + row * task.padded_dim + c,
                 {value.first * params.softmax_scale, value.second * params.softmax_scale});
    }
  }
}

// The keys of one part through the heads of the task; out and softmax are (heads, padded rows,
// ...).
template <typename T>
FAP_INLINE void decode_part(const DecodeTask& task, Range keys, Range heads, float* q, float* out,
                            PartialSoftmax* softmax) {
  const int64_t head_size = task.padded_rows * task.padded_dim;
  for (int64_t head = 0; head < heads.size(); ++head) {
    load_queries<T>(task, heads.begin + head, q + head * head_size);
  }
  std::memset(out, 0, static_cast<size_t>(heads.size() * head_size) * sizeof(float));
  for (int64_t i = 0; i < heads.size() * task.padded_rows; ++i) softmax[i] = {-kInfinity, 0.0f};
  if (keys.empty()) return;

  const auto block_at = [&](int64_t begin) {
    return Range{begin, std::min(begin + kDecodeBlock, keys.end)};
  };
  BlockRows blocks[2];
  locate_rows(task.params, task.sequence, task.batch, block_at(keys.begin), blocks[0]);
  int current = 0;
  for (int64_t begin = keys.begin; begin < keys.end; begin += kDecodeBlock) {
    const bool last = begin + kDecodeBlock >= keys.end;
    const BlockRows& block = blocks[current];
    BlockRows& next = blocks[current ^= 1];
    if (!last) {
      locate_rows(task.params, task.sequence, task.batch, block_at(begin + kDecodeBlock), next);
    }
    for (int64_t head = 0; head < heads.size(); ++head) {
      const bool last_head = head + 1 == heads.size();
      const BlockRows& next_block = !last_head || last ? block : next;
      decode_block<T>(task, heads.begin + head, begin, block, next_block,
                      last_head ? heads.begin : heads.begin + head + 1, q + head * head_size,
                      out + head * head_size, softmax + head * task.padded_rows);
    }
  }
}

// Merges the parts of one query row and writes its output and log-sum-exp. The parts lie
// `out_stride` and `softmax_stride` apart.
template <typename T>
FAP_INLINE void finish_row(const DecodeTask& task, int64_t head_k, int64_t row, int num_parts,
                           const float* out, int64_t out_stride, const PartialSoftmax* softmax,
                           int64_t softmax_stride) {
  const ForwardParams& params = task.params;
  const int64_t query = row / params.group_size();
  const int64_t head = head_k * params.group_size() + row % params.group_size();
  PartialSoftmax parts[kMaxSplits + 1];
  float weights[kMaxSplits + 1];
  for (int i = 0; i < num_parts; ++i) parts[i] = softmax[i * softmax_stride];
  const bool has_sink = params.s_aux != nullptr;
  if (has_sink) parts[num_parts] = {params.s_aux[head * params.s_aux_stride], 1.0f};
  float lse = merge_lse(parts, num_parts + has_sink, weights);
  float empty = 0.0f;
  if (!has_sink && lse == -kInfinity) {
    // Either there was nothing to see, or all scores were -inf, whose softmax is 0 / 0.
    if (task.mask.visible_keys(query).empty()) {
      lse = kInfinity;
    } else {
      empty = __builtin_nanf("");
    }
  }
  const int64_t q_row = task.sequence.q_begin + query;
  params.softmax_lse.set(task.batch, head, q_row, lse);

  T* result = static_cast<T*>(params.out.data) + task.batch * params.out.batch_stride +
              q_row * params.out.row_stride + head * params.out.head_stride;
  for (int64_t c = 0; c < params.head_dim; c += kPair) {
    VecPair sum{splat(empty), splat(empty)};
    for (int i = 0; i < num_parts; ++i) {
      const VecPair part = load_pair(out + i * out_stride + c);
      sum.first = fma(splat(weights[i]), part.first, sum.first);
      sum.second = fma(splat(weights[i]), part.second, sum.second);
    }
    const int64_t left = params.head_dim - c;
    if (left >= kPair) {
      store_pair(result + c, sum);
    } else {
      store_pair_partial(result + c, sum, static_cast<int>(left));
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// All sequences

FAP_INLINE DecodeTask decode_task(const ForwardParams& params, int64_t batch) {
  const Sequence sequence = sequence_at(params, batch);
  const int64_t rows = sequence.seqlen_q * params.group_size();
  return {params,
          batch,
          sequence,
          sequence.mask(params),
          rows,
          padded_decode_rows(rows),
          (params.head_dim + kPair - 1) / kPair * kPair};
}

// Keys that the rows of a sequence see, and into how many parts they are cut; 0 when decode() does
// not serve the sequence.
struct DecodeParts {
  Range keys;
  int count;
};
FAP_INLINE DecodeParts decode_parts(const DecodeTask& task) {
  if (task.num_rows == 0 || !is_decode_sequence(task.params, task.sequence.seqlen_q))
    return {{}, 0};
  const Range keys = task.mask.any_visible_keys({0, task.sequence.seqlen_q});
  const int wanted = task.params.num_splits;
  return {keys, wanted > 0 ? (wanted < kMaxSplits ? wanted : kMaxSplits)
                           : plan_splits(1, keys.size(), 0)};
}

// The last i with begins[i] <= index; begins[0] is 0 and begins grows.
FAP_INLINE int64_t find_interval(const int64_t* begins, int64_t count, int64_t index) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (begins[middle] <= index ? low : high) = middle;
  }
  return low;
}

template <typename T>
void decode_sequences(const ForwardParams& params) {
  const int64_t padded_dim = (params.head_dim + kPair - 1) / kPair * kPair;
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };

  // Sizes: parts, rows of the partial results of sequences that are cut, and the largest sequence.
  int64_t num_parts = 0, num_rows = 0, most_rows = 0, num_keys = 0;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    const DecodeTask task = decode_task(params, batch);
    const DecodeParts parts = decode_parts(task);
    if (parts.count == 0) continue;
    num_parts += parts.count;
    if (parts.count > 1) num_rows += parts.count * params.num_heads_k * task.padded_rows;
    most_rows = std::max(most_rows, task.padded_rows);
    num_keys += parts.keys.size();
  }
  if (num_parts == 0) return;

  // Key heads of a task. Heads that lie inside of a row are read together, as many as leave every
  // thread several tasks; heads that lie apart are better read one by one.
  const int64_t bytes = num_keys * params.num_heads_k * params.head_dim * 2 * int64_t{sizeof(T)};
  const int num_threads = bytes <= kDecodeParallelBytes ? 1
                          : params.num_threads > 0      ? params.num_threads
                                                        : num_available_cores();
  const int64_t state_bytes = 2 * most_rows * padded_dim * int64_t{sizeof(float)};
  int64_t chunks = 1;
  if (params.k.head_stride > params.k.row_stride) {
    chunks = params.num_heads_k;
  } else if (num_threads > 1) {
    chunks = (4 * num_threads + num_parts - 1) / num_parts;
  }
  chunks = std::max(chunks, params.num_heads_k * state_bytes / kDecodeStateBytes + 1);
  chunks = std::min(chunks, params.num_heads_k);
  const int64_t chunk_heads = (params.num_heads_k + chunks - 1) / chunks;
  chunks = (params.num_heads_k + chunk_heads - 1) / chunk_heads;

  // The caller's memory: first part and first partial row of every sequence, the partial results,
  // and what it needs for tasks of its own.
  const int64_t index_bytes = aligned((params.batch + 1) * int64_t{sizeof(int64_t)});
  const int64_t out_bytes = aligned(num_rows * padded_dim * int64_t{sizeof(float)});
  const int64_t softmax_bytes = aligned(num_rows * int64_t{sizeof(PartialSoftmax)});
  const int64_t shared_bytes = 2 * index_bytes + out_bytes + softmax_bytes;
  const int64_t task_rows = chunk_heads * most_rows;
  const int64_t task_out_bytes = task_rows * padded_dim * int64_t{sizeof(float)};
  const int64_t task_bytes =
      2 * task_out_bytes + aligned(task_rows * int64_t{sizeof(PartialSoftmax)});
  char* shared = static_cast<char*>(thread_scratch(static_cast<size_t>(shared_bytes + task_bytes)));
  auto* part_begin = reinterpret_cast<int64_t*>(shared);
  auto* row_begin = reinterpret_cast<int64_t*>(shared + index_bytes);
  auto* partial_out = reinterpret_cast<float*>(shared + 2 * index_bytes);
  auto* partial_softmax = reinterpret_cast<PartialSoftmax*>(shared + 2 * index_bytes + out_bytes);
  part_begin[0] = row_begin[0] = 0;
  for (int64_t batch = 0; batch < params.batch; ++batch) {
    const DecodeTask task = decode_task(params, batch);
    const int count = decode_parts(task).count;
    part_begin[batch + 1] = part_begin[batch] + count;
    row_begin[batch + 1] =
        row_begin[batch] + (count > 1 ? count * params.num_heads_k * task.padded_rows : 0);
  }

  parallel_for(num_threads, num_parts * chunks, [&](int64_t index, int worker) {
    char* own = worker == 0 ? shared + shared_bytes
                            : static_cast<char*>(thread_scratch(static_cast<size_t>(task_bytes)));
    const int64_t batch = find_interval(part_begin, params.batch + 1, index / chunks);
    const int split = static_cast<int>(index / chunks - part_begin[batch]);
    const int64_t first_head = index % chunks * chunk_heads;
    const Range heads{first_head, std::min(first_head + chunk_heads, params.num_heads_k)};
    const DecodeTask task = decode_task(params, batch);
    const DecodeParts parts = decode_parts(task);
    auto* q = reinterpret_cast<float*>(own);
    auto* out = reinterpret_cast<float*>(own + task_out_bytes);
    auto* softmax = reinterpret_cast<PartialSoftmax*>(own + 2 * task_out_bytes);
    if (parts.count > 1) {
      const int64_t row =
          row_begin[batch] + (split * params.num_heads_k + heads.begin) * task.padded_rows;
      out = partial_out + row * padded_dim;
      softmax = partial_softmax + row;
    }
    decode_part<T>(task, split_range(parts.keys, parts.count, split), heads, q, out, softmax);
    if (parts.count > 1) return;
    for (int64_t head = 0; head < heads.size(); ++head) {
      for (int64_t row = 0; row < task.num_rows; ++row) {
        const int64_t i = head * task.padded_rows + row;
        finish_row<T>(task, heads.begin + head, row, 1, out + i * padded_dim, 0, softmax + i, 0);
      }
    }
  });

  if (num_rows == 0) return;
  parallel_for(out_bytes <= kDecodeParallelBytes ? 1 : num_threads,
               params.batch * params.num_heads_k, [&](int64_t index, int) {
                 const int64_t batch = index / params.num_heads_k;
                 const int64_t head_k = index % params.num_heads_k;
                 const int64_t count = part_begin[batch + 1] - part_begin[batch];
                 if (count <= 1) return;
                 const DecodeTask task = decode_task(params, batch);
                 const int64_t part_rows = params.num_heads_k * task.padded_rows;
                 for (int64_t row = 0; row < task.num_rows; ++row) {
                   const int64_t i = row_begin[batch] + head_k * task.padded_rows + row;
                   finish_row<T>(task, head_k, row, static_cast<int>(count),
                                 partial_out + i * padded_dim, part_rows * padded_dim,
                                 partial_softmax + i, part_rows);
                 }
               });
}

// Serves the sequences for which is_decode_sequence() is true, and leaves the others alone.
void decode(const ForwardParams& params);
void decode(const ForwardParams& params) {
  switch (params.dtype) {
    case DType::kFloat32:
      return decode_sequences<float>(params);
    case DType::kFloat16:
      return decode_sequences<Half>(params);
    case DType::kBFloat16:
      return decode_sequences<BFloat16>(params);
  }
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
