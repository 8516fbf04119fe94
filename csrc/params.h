// What a kernel needs to know: plain structs, no torch header.
#pragma once
#include <cstdint>

enum class Dtype { kFloat, kHalf, kBFloat16 };

// How a tap is kept for backward, numbered as e3va.ops.storage.STORAGES; kFull: by the caller.
enum class Storage { kFull, kFp8, kInt8, kInt4 };

struct WindowAttentionParams {
  const void* qkv;            // [batch, height, width, 3 * heads * head_dim]
  const void* qkv_bias;       // [3 * heads * head_dim]
  const void* position_bias;  // [(2 * window - 1)^2, heads]
  void* out;                  // [batch, height, width, heads * head_dim]
  Dtype dtype;                // of all
  int64_t batch, height, width, heads, head_dim, window, shift;
};

struct SublayerEpilogueParams {
  const void* x;             // [tokens, channels]
  const void* y;             // [tokens, channels]
  const float* norm_weight;  // [channels], or null: no weight and bias
  const float* norm_bias;    // [channels]
  const float* P;            // [channels, rank]; null: no adapter
  void* y_out;               // [tokens, channels]
  void* z;                   // [tokens, channels], or null: not asked for
  void* t;                   // [tokens, rank]
  uint8_t* kept;             // [tokens, channels], or [tokens, (channels + 1) / 2] of kInt4
  float* scale;              // [tokens]
  Dtype dtype;               // of x, y, y_out, z and t
  bool norm_tap;             // whether the tap is the norm, not x
  Storage storage;
  uint32_t seed;             // of kInt4's stochastic rounding
  int64_t tokens, channels, rank;
  float eps;
};

// The adapters of a stage, one after the other. Tokens are those of maps [batch, height, width].
struct AdaptersParams {
  const void* t;       // [adapters, tokens, rank]
  const void* carry;   // [tokens, rank], the state before the stage, or null: zero
  const float* D;      // [adapters, rank, side, side], or null: no mixing
  const float* gamma;  // [adapters, rank], or null: no state
  const float* Q;      // [adapters, rank, hidden]
  const float* b;      // [adapters, hidden]
  const float* U;      // [adapters, hidden, rank]
  void* S;             // [tokens, adapters * rank]
  void* u;             // [adapters, tokens, rank]; null: no state
  void* after;         // [tokens, rank], the state after the stage
  float* state;        // [tokens, adapters_row(rank)], room for it
  Dtype dtype;         // of t, carry, S and u
  int64_t adapters, height, width, tokens, rank, hidden, side;
  int64_t adapter;     // the one to be computed
};

struct AdaptersBackwardParams {
  const void* dS;       // [tokens, adapters * rank]
  const void* dcarry;   // [tokens, rank], of the state after the stage, or null: zero
  const void* u;        // [adapters, tokens, rank]
  const float* D;       // as AdaptersParams has them
  const float* gamma;
  const float* Q;
  const float* b;
  const float* U;
  void* S;              // [tokens, adapters * rank]
  void* dt;             // [adapters, tokens, rank]
  void* dbefore;        // [tokens, rank], of the state before the stage
  float* dstate;        // [tokens, adapters_row(rank)], room for the gradient of the state
  float* dmixed[2];     // … and for that of what Q multiplies, of every other adapter
  float* partial_sums;  // [chunks, adapters_backward_sums]
  float* dD;            // gradients of the parameters, laid out as these are
  float* dQ;
  float* db;
  float* dU;
  Dtype dtype;          // of dS, dcarry, u, S, dt and dbefore
  int64_t adapters, height, width, tokens, rank, hidden, side;
  int64_t adapter;      // the one to be computed
};

struct TapGradientParams {
  const void* const* taps;    // [adapters] of [tokens, channels], or as they are kept
  const float* const* scale;  // [adapters] of [tokens], of kept taps
  const void* dt;             // [adapters, tokens, rank]
  float* partial_sums;        // [adapters, parts, rank, channels]
  float* dP;                  // [adapters, channels, rank]
  Dtype dtype;                // of dt, and of full taps
  Storage storage;
  int64_t adapters, tokens, channels, rank;
};
