// Window attention on the CPU: gathers one window and head into fp32 scratch, two small GEMMs and a
// softmax there, scatters the result. Nothing the size of the map is ever made but the output.
#include "window_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../window_index.h"

// One build runs at full width on every x86-64; elsewhere the compiler's default has to do.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define E3VA_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define E3VA_MULTIVERSION
#endif

namespace {

constexpr int kLanes = 16;  // columns are padded to this
constexpr int kRows = 4;    // rows of a register tile
constexpr float kMasked = -100.0f;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

float to_float(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};

float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

struct Half {
  uint16_t bits;
};

float to_float(Half x) {
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

void store(float* out, float x) { *out = x; }

void store(BFloat16* out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void store(Half* out, float x) {
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

// C [m, n] = A [m, k] · B [k, n]; n is a multiple of kLanes, rows of C up to a multiple of kRows
// may be written.
E3VA_MULTIVERSION void gemm(
    const float* __restrict__ A, int64_t lda, const float* __restrict__ B, int64_t ldb,
    float* __restrict__ C, int64_t ldc, int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i += kRows) {
    for (int64_t j = 0; j < n; j += kLanes) {
      float sum[kRows][kLanes] = {};
      for (int64_t p = 0; p < k; ++p) {
        const float* b = B + p * ldb + j;
        for (int r = 0; r < kRows; ++r) {
          float a = A[(i + r) * lda + p];
          for (int c = 0; c < kLanes; ++c) sum[r][c] += a * b[c];
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kLanes; ++c) C[(i + r) * ldc + j + c] = sum[r][c];
    }
  }
}

// exp(x) for x <= 0 to some 1e-7: 2^n times a polynomial of the rest (Cephes' expf).
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// Rows of S [m, n], padded to ld: S·scale + bias, softmax over the first n, zero beyond.
E3VA_MULTIVERSION void softmax(
    float* __restrict__ S, const float* __restrict__ bias, float scale, int64_t m, int64_t n,
    int64_t ld) {
  for (int64_t i = 0; i < m; ++i) {
    float* row = S + i * ld;
    const float* b = bias + i * ld;
    float top[kLanes], sum[kLanes] = {};
    std::fill(top, top + kLanes, -INFINITY);
    for (int64_t j = 0; j < ld; j += kLanes)
      for (int c = 0; c < kLanes; ++c) {
        row[j + c] = row[j + c] * scale + b[j + c];  // b is -inf beyond n
        top[c] = std::max(top[c], row[j + c]);
      }
    float largest = *std::max_element(top, top + kLanes);
    for (int64_t j = 0; j < ld; j += kLanes)
      for (int c = 0; c < kLanes; ++c) {
        row[j + c] = exp_negative(row[j + c] - largest);
        sum[c] += row[j + c];
      }
    float total = 0;
    for (float s : sum) total += s;
    total -= float(ld - n) * exp_negative(-INFINITY);
    float inverse = 1.0f / total;
    for (int64_t j = 0; j < ld; ++j) row[j] *= inverse;
  }
}

template <typename T>
void run(const WindowAttentionParams& p, int64_t begin, int64_t end) {
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
      if (inside) {
        const T* source = qkv + token[t] * 3 * C + head * d;
        for (int64_t c = 0; c < d; ++c) {
          q[t * d + c] = to_float(source[c]);
          k[c * ld + t] = to_float(source[C + c]);
          v[t * dl + c] = to_float(source[2 * C + c]);
        }
      } else {
        const float* source = p.qkv_bias + head * d;
        for (int64_t c = 0; c < d; ++c) {
          q[t * d + c] = source[c];
          k[c * ld + t] = source[C + c];
          v[t * dl + c] = source[2 * C + c];
        }
      }
    }
    if (item == begin || window == 0) {
      std::fill(bias.begin(), bias.end(), -INFINITY);
      for (int64_t a = 0; a < tokens; ++a)
        for (int64_t b = 0; b < tokens; ++b) {
          const int64_t row = position_bias_row(
              p.window, a / p.window, a % p.window, b / p.window, b % p.window);
          bias[a * ld + b] = p.position_bias[row * p.heads + head];
        }
    }
    gemm(q.data(), d, k.data(), ld, S.data(), ld, tokens, ld, d);
    if (mixed)
      for (int64_t a = 0; a < tokens; ++a)
        for (int64_t b = 0; b < tokens; ++b)
          if (region[a] != region[b]) S[a * ld + b] += kMasked / scale;
    softmax(S.data(), bias.data(), scale, tokens, tokens, ld);
    gemm(S.data(), ld, v.data(), dl, O.data(), dl, tokens, dl, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      if (token[t] >= 0)
        for (int64_t c = 0; c < d; ++c) store(out + token[t] * C + head * d + c, O[t * dl + c]);
  }
}

}  // namespace

int64_t window_attention_items(const WindowAttentionParams& p) {
  const WindowAxis rows(p.height, p.window, p.shift), columns(p.width, p.window, p.shift);
  return p.batch * p.heads * rows.windows() * columns.windows();
}

void window_attention_cpu(const WindowAttentionParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case Dtype::kFloat:
      return run<float>(params, begin, end);
    case Dtype::kHalf:
      return run<Half>(params, begin, end);
    case Dtype::kBFloat16:
      return run<BFloat16>(params, begin, end);
  }
}
