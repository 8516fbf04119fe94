#pragma once
#include "../params.h"

// Tokens [begin, end) of a compressed tap, widened.
void expand_tap_cpu(const ExpandTapParams& params, int64_t begin, int64_t end);
