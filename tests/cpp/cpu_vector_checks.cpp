// Checks of the CPU kernels' shared layer (src/cpu: vectors, conversions, elementary functions,
// dropout, packing and products). Compiled once per instruction set, as kernels.cpp is, FAP_ISA
// being its name with "test_" before it; cpu_vector_test.cpp looks at the results.
#include "cpu_vector_checks.h"

#include "cpu/dropout_lanes.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/vector_math.h"

namespace flash_attn_plus::cpu::FAP_ISA {
namespace {

// Numbers in (-1, 1) with few bits set to nothing in particular.
struct Generator {
  uint32_t state = 1;
  uint32_t bits() {
    state = state * 1664525u + 1013904223u;
    return state ^ (state >> 15);
  }
  float operator()() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }
};

// The largest relative error of f over n points of [low, high], in units of 2^-23.
template <typename F, typename Exact>
double largest_error(F f, Exact exact, float low, float high, int n) {
  double largest = 0;
  for (int i = 0; i < n; ++i) {
    const float x = low + (high - low) * static_cast<float>(i) / static_cast<float>(n);
    const double wanted = exact(static_cast<double>(x));
    if (wanted == 0) continue;
    const double error = __builtin_fabs((f(splat(x))[0] - wanted) / wanted) * 0x1p23;
    if (!(error <= largest)) largest = error;
  }
  return largest;
}

double exp_error() {
  return largest_error([](Vec x) { return exp(x); }, [](double x) { return __builtin_exp(x); },
                       -86.0f, 88.0f, 200000);
}
double exp2_error() {
  return largest_error([](Vec x) { return exp2(x); }, [](double x) { return __builtin_exp2(x); },
                       -124.0f, 127.0f, 200000);
}
double tanh_error() {
  return largest_error([](Vec x) { return tanh(x); }, [](double x) { return __builtin_tanh(x); },
                       -10.0f, 10.0f, 200000);
}
double log_error() {
  return largest_error([](Vec x) { return log(x); }, [](double x) { return __builtin_log(x); },
                       1e-3f, 100.0f, 200000);
}

// Special values that are wrong.
int special_value_errors() {
  const float inf = kInfinity, nan = __builtin_nanf("");
  int errors = 0;
  errors += exp(splat(-inf))[0] != 0.0f;
  errors += exp(splat(inf))[0] != inf;
  errors += exp(splat(0.0f))[0] != 1.0f;
  errors += !__builtin_isnan(exp(splat(nan))[0]);
  errors += exp2(splat(-inf))[0] != 0.0f;
  errors += !__builtin_isnan(exp2<3>(splat(nan))[0]);
  errors += tanh(splat(inf))[0] != 1.0f;
  errors += tanh(splat(-inf))[0] != -1.0f;
  errors += !__builtin_isnan(tanh(splat(nan))[0]);
  errors += log(splat(0.0f))[0] != -inf;
  errors += log(splat(inf))[0] != inf;
  errors += !__builtin_isnan(log(splat(-1.0f))[0]);
  errors += !__builtin_isnan(max(splat(1.0f), splat(nan))[0]);
  return errors;
}

// One bf16 number of a float, by the definition of rounding to nearest even.
uint16_t expected_bfloat16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  const uint32_t lower = u & 0xFFFFu, upper = u >> 16;
  return static_cast<uint16_t>(upper + (lower > 0x8000u || (lower == 0x8000u && (upper & 1u))));
}

// All fp16 and bf16 numbers there and back, and the nearest ones to random floats.
int conversion_errors() {
  int errors = 0;
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t word = static_cast<uint16_t>(i);
    const bool half_nan = (i & 0x7C00u) == 0x7C00u && (i & 0x3FFu) != 0;
    const bool bfloat16_nan = (i & 0x7F80u) == 0x7F80u && (i & 0x7Fu) != 0;
    Half halves[kLanes];
    BFloat16 bfloat16s[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      halves[j].bits = word;
      bfloat16s[j].bits = word;
    }
    const Vec half = load_float(halves), bfloat16 = load_float(bfloat16s);
    errors += __builtin_isnan(half[0]) != half_nan;
    errors += __builtin_isnan(bfloat16[0]) != bfloat16_nan;
    store_float(halves, half);
    store_float(bfloat16s, bfloat16);
    if (!half_nan) errors += halves[0].bits != word;
    if (!bfloat16_nan) errors += bfloat16s[0].bits != word;
  }
  Generator random;
  for (int i = 0; i < 200000; ++i) {
    const float x = bits<float>(random.bits());
    if (x != x) continue;
    BFloat16 bfloat16s[kLanes];
    store_float(bfloat16s, splat(x));
    errors += bfloat16s[0].bits != expected_bfloat16(x);
    // Neighbours of the rounded number may not be nearer.
    Half halves[kLanes];
    store_float(halves, splat(x));
    if ((halves[0].bits & 0x7FFFu) >= 0x7BFFu || (halves[0].bits & 0x7FFFu) == 0) continue;
    const auto value = [&](int step) {
      return static_cast<double>(
          half_to_float(splat(static_cast<uint32_t>(halves[0].bits + step)))[0]);
    };
    const double error = __builtin_fabs(value(0) - x);
    errors += error > __builtin_fabs(value(1) - x) || error > __builtin_fabs(value(-1) - x);
  }
  return errors;
}

// Lanes whose dropout differs from attention/dropout.h.
int dropout_errors(const Dropout& dropout) {
  Generator random;
  int errors = 0;
  for (int i = 0; i < 500; ++i) {
    const int64_t column = random.bits() % 100000, batch = random.bits() % 1000;
    const VecI row = lane_index() + static_cast<int32_t>(random.bits() % 100000);
    const VecI head = lane_index() * 3;
    const DropoutLanes lanes = DropoutLanes::of(row, head);
    VecU word[4];
    dropout_words(dropout, lanes, batch, dropout_column_counter(column), word);
    const VecI keeps = dropout_keeps(dropout, lanes, word[(column >> 3) & 3]);
    for (int j = 0; j < kLanes; ++j) {
      errors += (keeps[j] != 0) !=
                flash_attn_plus::dropout_keeps(dropout, batch, head[j], row[j], column);
    }
  }
  return errors;
}

constexpr int kMaxM = 48, kMaxN = 160, kMaxK = 96;

// The largest error of C += A B over many sizes, times 2^23 and divided by k.
template <bool kTransposedA>
double gemm_error() {
  alignas(64) static float a[kMaxM * kMaxK], b[kMaxK * kMaxN], c[kMaxM * kMaxN];
  Generator random;
  double largest = 0;
  for (int m : {1, 2, 5, 6, 7, 13, 48}) {
    for (int n = kLanes; n <= kMaxN; n += 3 * kLanes) {
      for (int k : {1, 2, 33, 96}) {
        for (float& x : a) x = random();
        for (float& x : b) x = random();
        for (float& x : c) x = 1.0f;
        const int64_t lda = kTransposedA ? m : k;
        gemm<kTransposedA>(m, n, k, a, lda, b, n, c, n, false);
        gemm<kTransposedA>(m, n, k, a, lda, b, n, c, n, true);
        for (int i = 0; i < m; ++i) {
          for (int j = 0; j < n; ++j) {
            double sum = 0;
            for (int x = 0; x < k; ++x) {
              sum += static_cast<double>(kTransposedA ? a[x * m + i] : a[i * k + x]) * b[x * n + j];
            }
            const double error = __builtin_fabs(c[i * n + j] - 2 * sum) * 0x1p23 / k;
            if (!(error <= largest)) largest = error;
          }
        }
      }
    }
  }
  return largest;
}

#if defined(__AVX512BF16__)

// The largest error of C = A B with operands packed in every way, relative to 2^-8 kNumParts, k
// terms. Numbers are first rounded to what kNumParts parts hold exactly.
template <int kNumParts>
double bf16_gemm_error(bool transposed) {
  constexpr int kRows = 37, kColumns = 21, kDepth = 40;               // as they are
  constexpr int kPaddedRows = 48, kPaddedColumns = 32, kPadded = 64;  // as they are packed
  static float a[kRows * kDepth], b[kColumns * kDepth];
  const float* a_rows[kDepth];
  const float* b_rows[kDepth];
  alignas(64) static BFloat16 a_packed[3 * 64 * 64], b_packed[3 * 64 * 64];
  alignas(64) static float c[64 * 64];
  Generator random;
  const uint32_t kept = kNumParts == 1 ? 0xFFFF0000u : kNumParts == 2 ? 0xFFFFE000u : ~0u;
  for (float& x : a) x = bits<float>(bits<uint32_t>(random()) & kept);
  for (float& x : b) x = bits<float>(bits<uint32_t>(random()) & kept);
  AmxTiles tiles;
  // Transposed: rows of a and b hold the depth, k runs over rows.
  const int m = kRows, n = kColumns, k = kDepth;
  for (int i = 0; i < k; ++i) {
    a_rows[i] = transposed ? a + i * m : a + (i < m ? i : 0) * k;
    b_rows[i] = transposed ? b + i * n : b + (i < n ? i : 0) * k;
  }
  bool finite = true;
  if (transposed) {
    finite &= pack_a_columns<kNumParts>(a_rows, k, m, kPaddedRows, kPadded, a_packed, 64, 64 * 64);
    finite &= pack_b_rows<kNumParts>(b_rows, k, n, kPadded, kPaddedColumns, b_packed, 64, 64 * 64);
  } else {
    finite &= pack_a_rows<kNumParts>(a_rows, m, k, kPadded, a_packed, 64, 64 * 64);
    for (int part = 0; part < kNumParts; ++part) {
      for (int i = m * 64; i < kPaddedRows * 64; ++i) a_packed[part * 64 * 64 + i] = {0};
    }
    finite &=
        pack_b_columns<kNumParts>(b_rows, n, k, kPadded, kPaddedColumns, b_packed, 64, 64 * 64);
  }
  if (!finite) return kInfinity;
  gemm<kNumParts>(kPaddedRows, kPaddedColumns, kPadded, {a_packed, 64, 64 * 64},
                  {b_packed, 64, 64 * 64}, c, kPaddedColumns, false);
  gemm<kNumParts>(kPaddedRows, kPaddedColumns, kPadded, {a_packed, 64, 64 * 64},
                  {b_packed, 64, 64 * 64}, c, kPaddedColumns, true);
  double largest = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int x = 0; x < k; ++x) {
        sum += static_cast<double>(transposed ? a[x * m + i] : a[i * k + x]) *
               (transposed ? b[x * n + j] : b[j * k + x]);
      }
      const double error = __builtin_fabs(c[i * kPaddedColumns + j] - 2 * sum);
      if (!(error <= largest)) largest = error;
    }
  }
  return largest;
}

// Packing reports numbers that are not finite.
int finiteness_errors() {
  int errors = 0;
  alignas(64) static BFloat16 packed[3 * 64 * 64];
  for (float bad : {kInfinity, -kInfinity, __builtin_nanf(""), 1.0f}) {
    float row[20] = {};
    row[19] = bad;
    const float* rows[1] = {row};
    const bool expected = bad == 1.0f;
    errors += pack_a_rows<1>(rows, 1, 20, 32, packed, 64, 64 * 64) != expected;
    errors += pack_a_columns<1>(rows, 1, 20, 32, 32, packed, 64, 64 * 64) != expected;
    errors += pack_b_rows<1>(rows, 1, 20, 2, 32, packed, 64, 64 * 64) != expected;
    errors += pack_b_columns<1>(rows, 1, 20, 32, 16, packed, 64, 64 * 64) != expected;
  }
  return errors;
}

#endif  // __AVX512BF16__

}  // namespace

CpuVectorChecks run_checks(const Dropout& dropout);
CpuVectorChecks run_checks(const Dropout& dropout) {
  CpuVectorChecks checks;
  checks.exp_error = exp_error();
  checks.exp2_error = exp2_error();
  checks.tanh_error = tanh_error();
  checks.log_error = log_error();
  checks.special_value_errors = special_value_errors();
  checks.conversion_errors = conversion_errors();
  checks.dropout_errors = dropout_errors(dropout);
  checks.gemm_error = gemm_error<false>();
  checks.transposed_gemm_error = gemm_error<true>();
#if defined(__AVX512BF16__)
  checks.finiteness_errors = finiteness_errors();
  for (bool transposed : {false, true}) {
    checks.bf16_gemm_error[0][transposed] = bf16_gemm_error<1>(transposed);
#if defined(__AMX_BF16__)
    checks.bf16_gemm_error[1][transposed] = bf16_gemm_error<2>(transposed);
    checks.bf16_gemm_error[2][transposed] = bf16_gemm_error<3>(transposed);
#endif
  }
#endif
  return checks;
}

}  // namespace flash_attn_plus::cpu::FAP_ISA
