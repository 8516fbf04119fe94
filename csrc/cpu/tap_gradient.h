#pragma once
#include "../params.h"

// Parts of the taps' rows; each has its partial sums, so that these do not depend on who computes
// which.
int64_t tap_gradient_parts(const TapGradientParams& params);
int64_t tap_gradient_items(const TapGradientParams& params);
void tap_gradient_cpu(const TapGradientParams& params, int64_t begin, int64_t end);

// Adds the partial sums of adapters [begin, end) up, in the order of their parts.
void tap_gradient_sum(const TapGradientParams& params, int64_t begin, int64_t end);
