// What a kernel needs to know: plain structs, no torch header.
#pragma once
#include <cstdint>

enum class Dtype { kFloat, kHalf, kBFloat16 };

struct WindowAttentionParams {
  const void* qkv;             // [batch, height, width, 3 * heads * head_dim]
  const float* qkv_bias;       // [3 * heads * head_dim]
  const float* position_bias;  // [(2 * window - 1)^2, heads]
  void* out;                   // [batch, height, width, heads * head_dim]
  Dtype dtype;                 // of qkv and out
  int64_t batch, height, width, heads, head_dim, window, shift;
};
