#pragma once
#include "../params.h"

// Blocks of rows. Those of one adapter can be computed independently, after all of the one before:
// `adapter` is first -1, which makes what the first one reads, with a state, then 0, 1, ….
int64_t adapters_items(const AdaptersParams& params);
void adapters_cpu(const AdaptersParams& params, int64_t begin, int64_t end);

// Floats of a row of the state, and of other rooms for rank values.
int64_t adapters_row(int64_t rank);
