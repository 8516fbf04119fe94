#pragma once
#include "../params.h"

// Blocks of rows, which can be computed independently.
int64_t sublayer_epilogue_items(const SublayerEpilogueParams& params);
void sublayer_epilogue_cpu(const SublayerEpilogueParams& params, int64_t begin, int64_t end);
