// Window attention on the CPU: gathers one window and head into fp32 scratch, two small GEMMs and a
// softmax there, scatters the result. Nothing the size of the map is ever made but the output.
#include "window_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../window_index.h"

// Everything below is inlined into one function per instruction set (see the end), so that one build
// runs at full width on every x86-64. Elsewhere the compiler's default has to do.
#define E3VA_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;  // of a vector; columns are padded to this
constexpr int kRows = 6;    // of a register tile; rows are padded to this
constexpr float kMasked = -100.0f;

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

E3VA_INLINE Floats& vector(float* at) { return *reinterpret_cast<Floats*>(at); }
E3VA_INLINE const Floats& vector(const float* at) { return *reinterpret_cast<const Floats*>(at); }

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

E3VA_INLINE float to_float(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};

E3VA_INLINE float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Half {
  uint16_t bits;
};

E3VA_INLINE float to_float(Half x) {
  // Shifts exponent and mantissa into place; the product rebiases, subnormals included.
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &rest, 4);
  f = (x.bits & 0x7c00) == 0x7c00 ? ((x.bits & 0x3ff) ? NAN : INFINITY) : f * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

E3VA_INLINE void store(float* out, float x) { *out = x; }

E3VA_INLINE void store(BFloat16* out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

E3VA_INLINE void store(Half* out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  float magnitude = std::fabs(x);
  uint16_t half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    half = uint16_t(std::nearbyint(magnitude * 0x1p24f));
  } else {
    bits &= 0x7fffffff;
    bits += 0xfff + ((bits >> 13) & 1);
    half = uint16_t((bits - 0x38000000) >> 13);
  }
  out->bits = sign | half;
}

// One token's query, key (as a column) and value of one head.
template <typename T>
E3VA_INLINE void gather(
    const T* __restrict__ source, int64_t C, int64_t d, float* __restrict__ q,
    float* __restrict__ k, int64_t ldk, float* __restrict__ v) {
  for (int64_t c = 0; c < d; ++c) q[c] = to_float(source[c]);
  for (int64_t c = 0; c < d; ++c) k[c * ldk] = to_float(source[C + c]);
  for (int64_t c = 0; c < d; ++c) v[c] = to_float(source[2 * C + c]);
}

// C [m, n] = A [m, k] · B [k, n]; m is a multiple of kRows, n of kLanes.
E3VA_INLINE void gemm(
    const float* __restrict__ A, int64_t lda, const float* __restrict__ B, int64_t ldb,
    float* __restrict__ C, int64_t ldc, int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i += kRows) {
    for (int64_t j = 0; j < n; j += kLanes) {
      Floats sum[kRows] = {};
      for (int64_t p = 0; p < k; ++p) {
        const Floats b = vector(B + p * ldb + j);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) sum[r] += A[(i + r) * lda + p] * b;
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) vector(C + (i + r) * ldc + j) = sum[r];
    }
  }
}

// exp(x) for x <= 0 to some 1e-7: 2^n times a polynomial of the rest (Cephes' expf). What would be
// subnormal, and slow to compute with, is zero.
E3VA_INLINE void exp_negative(Floats& x) {
  const Ints tiny = x < -80.0f;
  x = tiny ? Floats{} - 80.0f : x;
  const Floats round = Floats{} + 12582912.0f;  // 1.5 · 2^23: what is added to it loses its fraction
  const Floats n = (x * 1.44269504f + round) - round;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  x = tiny ? Floats{} : p * reinterpret_cast<const Floats&>(bits);
}

// Rows of S [m, n], padded to ld: softmax(S·scale + bias) over the first n.
E3VA_INLINE void softmax(
    float* __restrict__ S, const float* __restrict__ bias, float scale, int64_t m, int64_t ld) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = S + i * ld;
    Floats top = Floats{} - INFINITY, sum = {};
    for (int64_t j = 0; j < ld; j += kLanes) {
      const Floats score = vector(row + j) * scale + vector(bias + i * ld + j);
      top = score > top ? score : top;
      vector(row + j) = score;
    }
    float largest = top[0];
    for (int c = 1; c < kLanes; ++c) largest = std::max(largest, top[c]);
    for (int64_t j = 0; j < ld; j += kLanes) {
      Floats weight = vector(row + j) - largest;
      exp_negative(weight);
      sum += weight;
      vector(row + j) = weight;
    }
    float total = 0;
    for (int c = 0; c < kLanes; ++c) total += sum[c];
    const float inverse = 1.0f / total;
    for (int64_t j = 0; j < ld; j += kLanes) vector(row + j) *= inverse;
  }
}

template <typename T>
E3VA_INLINE void run_as(const WindowAttentionParams& p, int64_t begin, int64_t end) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  const int64_t tokens = p.window * p.window, windows = rows.windows() * columns.windows();
  const int64_t d = p.head_dim, C = p.heads * d;
  const int64_t m = round_up(tokens, kRows), ld = round_up(tokens, kLanes), dl = round_up(d, kLanes);
  std::vector<float> q(m * d), k(d * ld), v(ld * dl), S(m * ld), bias(tokens * ld), O(m * dl);
  std::vector<int64_t> token(tokens), region(tokens);
  const T* qkv = static_cast<const T*>(p.qkv);
  T* out = static_cast<T*>(p.out);
  const float scale = 1.0f / std::sqrt(float(d));

  for (int64_t item = begin; item < end; ++item) {
    // Windows vary fastest, so that neighbouring items share the head's position bias.
    const int64_t window = item % windows, head = item / windows % p.heads;
    const int64_t image = item / windows / p.heads;
    const int64_t wi = window / columns.windows(), wj = window % columns.windows();
    bool mixed = false;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t i = rows.position(wi, t / p.window), j = columns.position(wj, t % p.window);
      const bool inside = i < p.height && j < p.width;
      token[t] = inside ? (image * p.height + i) * p.width + j : -1;
      region[t] = rows.region(wi, t / p.window) * 3 + columns.region(wj, t % p.window);
      mixed |= region[t] != region[0];
      float *q_t = q.data() + t * d, *k_t = k.data() + t, *v_t = v.data() + t * dl;
      if (inside)
        gather(qkv + token[t] * 3 * C + head * d, C, d, q_t, k_t, ld, v_t);
      else
        gather(p.qkv_bias + head * d, C, d, q_t, k_t, ld, v_t);
    }
    if (item == begin || window == 0) {
      std::fill(bias.begin(), bias.end(), -INFINITY);
      float* to = bias.data();
      for (int64_t qi = 0; qi < p.window; ++qi)
        for (int64_t qj = 0; qj < p.window; ++qj, to += ld)
          for (int64_t ki = 0; ki < p.window; ++ki)
            for (int64_t kj = 0; kj < p.window; ++kj)
              to[ki * p.window + kj] =
                  p.position_bias[position_bias_row(p.window, qi, qj, ki, kj) * p.heads + head];
    }
    gemm(q.data(), d, k.data(), ld, S.data(), ld, m, ld, d);
    if (mixed)
      for (int64_t a = 0; a < tokens; ++a)
        for (int64_t b = 0; b < tokens; ++b)
          if (region[a] != region[b]) S[a * ld + b] += kMasked / scale;
    softmax(S.data(), bias.data(), scale, tokens, ld);
    gemm(S.data(), ld, v.data(), dl, O.data(), dl, m, dl, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      if (token[t] >= 0)
        for (int64_t c = 0; c < d; ++c) store(out + token[t] * C + head * d + c, O[t * dl + c]);
  }
}

E3VA_INLINE void run(const WindowAttentionParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case Dtype::kFloat:
      return run_as<float>(params, begin, end);
    case Dtype::kHalf:
      return run_as<Half>(params, begin, end);
    case Dtype::kBFloat16:
      return run_as<BFloat16>(params, begin, end);
  }
}

#ifdef __x86_64__
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(
    const WindowAttentionParams& params, int64_t begin, int64_t end) {
  run(params, begin, end);
}

__attribute__((target("avx2,fma"))) void run_avx2(
    const WindowAttentionParams& params, int64_t begin, int64_t end) {
  run(params, begin, end);
}
#endif

}  // namespace

int64_t window_attention_items(const WindowAttentionParams& p) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  return p.batch * p.heads * rows.windows() * columns.windows();
}

void window_attention_cpu(const WindowAttentionParams& params, int64_t begin, int64_t end) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return run_avx512(params, begin, end);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return run_avx2(params, begin, end);
#endif
  run(params, begin, end);
}
