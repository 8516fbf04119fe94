// What a kernel needs to know: plain structs, no torch header.
#pragma once
#include <cstdint>

enum class Dtype { kFloat, kHalf, kBFloat16 };

// How a tap is kept for backward, numbered as e3va.ops.taps.TAPS; kFull: by the caller.
enum class Taps { kFull, kFp8, kInt8, kInt4 };

struct WindowAttentionParams {
  const void* qkv;             // [batch, height, width, 3 * heads * head_dim]
  const float* qkv_bias;       // [3 * heads * head_dim]
  const float* position_bias;  // [(2 * window - 1)^2, heads]
  void* out;                   // [batch, height, width, heads * head_dim]
  Dtype dtype;                 // of qkv and out
  int64_t batch, height, width, heads, head_dim, window, shift;
};

struct SublayerEpilogueParams {
  const void* x;             // [tokens, channels]
  const void* y;             // [tokens, channels]
  const float* norm_weight;  // [channels], or null: no norm
  const float* norm_bias;    // [channels]
  const float* P;            // [channels, rank]; null: no adapter
  const float* Q;            // [rank, hidden]
  const float* b;            // [hidden]
  const float* U;            // [hidden, rank]
  void* y_out;               // [tokens, channels]
  void* z;                   // [tokens, channels]
  void* t;                   // [tokens, rank]
  void* s;                   // [tokens, rank]
  uint8_t* tap;              // [tokens, channels], or [tokens, (channels + 1) / 2] of kInt4
  float* tap_scale;          // [tokens]
  Dtype dtype;               // of x, y, y_out, z, t and s
  Taps taps;
  uint32_t seed;             // of kInt4's stochastic rounding
  int64_t tokens, channels, rank, hidden;
  float eps;
};

struct AdapterBackwardParams {
  const void* x;        // the tap: [tokens, channels], or as SublayerEpilogueParams stores it
  const float* scale;   // [tokens] of a stored tap
  const void* t;        // [tokens, rank]
  const void* dS;       // [tokens, rank], rows `stride` apart
  const float* Q;       // [rank, hidden]
  const float* b;       // [hidden]
  const float* U;       // [hidden, rank]
  void* S;              // [tokens, rank], rows `stride` apart
  float* partial_sums;  // [chunks, (channels + 2 * hidden) * rank + hidden]: dPᵀ, dQ, dUᵀ, db
  Dtype dtype;          // of t, dS and S, and of a full tap
  Taps taps;
  int64_t tokens, channels, rank, hidden, stride;
};
