// Packing: rows of q, k, v or of their gradients, which lie anywhere in memory and have any type,
// into the dense blocks that the products read; and the way back for results.
//
// Rows are given as an array of pointers, so that pages, strides and packed query groups are all
// the same here. A null pointer is a row of zeros; what is padded is 0 and is never read from
// memory.
//
//   pack_rows            float   dst[i][x]             = row i
//   pack_columns         float   dst[x][i]             = row i
//   pack_a_rows          bf16    dst[i][x]             A of a product, rows
//   pack_a_columns       bf16    dst[x][i]             A of a product, transposed
//   pack_b_rows          bf16    dst[i / 2][x][i % 2]  B of a product: k runs over rows
//   pack_b_columns       bf16    dst[x / 2][i][x % 2]  B of a product, transposed: k runs along
//   rows unpack_columns       T       row i                 = src[x][i]
//
// The bf16 forms write kNumParts parts, one after another. All that read return whether every
// number was finite: the lower parts of inf and NaN are 0, so sums of products are right without
// them only.
#pragma once

#include "cpu/pack_bf16.h"
#include "cpu/pack_float.h"
