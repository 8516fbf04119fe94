#pragma once
#include "../params.h"

// Chunks of rows; each has its partial sums, so that these do not depend on who computes which. The
// adapters follow each other from the last one on; `adapter` is in the end -1, which leaves what its
// neighbours contribute to the first one. After each of them the partial sums are added up.
int64_t adapters_backward_chunks(const AdaptersBackwardParams& params);
void adapters_backward_cpu(const AdaptersBackwardParams& params, int64_t begin, int64_t end);

// Adds the chunks' partial sums up, in their order, to the gradients of parameters.
void adapters_backward_sum(const AdaptersBackwardParams& params);
int64_t adapters_backward_sums(const AdaptersBackwardParams& params);
