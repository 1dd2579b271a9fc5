// What cpu_vector_checks.cpp finds out about the vectors of one instruction set.
#pragma once

#include "attention/dropout.h"

namespace flash_attn_plus::cpu {

struct CpuVectorChecks {
  // Largest relative errors, in units of 2^-23.
  double exp_error, exp2_error, tanh_error, log_error;

  // Numbers that are wrong.
  int special_value_errors, conversion_errors, dropout_errors;
  int finiteness_errors = 0;

  // Largest errors of sums of k products of numbers below 1: of float, in units of k 2^-23; of 1, 2
  // and 3 parts of bf16, k = 40, absolute, for both ways to pack.
  double gemm_error, transposed_gemm_error;
  double bf16_gemm_error[3][2] = {};
};

}  // namespace flash_attn_plus::cpu
