#pragma once
#include "../params.h"

// Chunks of rows; each has its partial sums, so that these do not depend on who computes which.
int64_t adapter_backward_chunks(const AdapterBackwardParams& params);
void adapter_backward_cpu(const AdapterBackwardParams& params, int64_t begin, int64_t end);

// Adds the partial sums up, in the order of the chunks.
void adapter_backward_sum(const AdapterBackwardParams& params, float* sums);
