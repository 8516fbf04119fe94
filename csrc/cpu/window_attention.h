#pragma once
#include "../params.h"

// Items of work: one per (image, window, head).
int64_t window_attention_items(const WindowAttentionParams& params);

// Items [begin, end), on the calling thread.
void window_attention_cpu(const WindowAttentionParams& params, int64_t begin, int64_t end);
