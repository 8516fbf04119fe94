#pragma once
#include "../params.h"

// Launches on `stream` (a cudaStream_t); nullptr, or what went wrong.
const char* window_attention_cuda(const WindowAttentionParams& params, void* stream);
